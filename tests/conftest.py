"""What many tests share: tiny random models of real families, a tokenizer, the shared data."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from alphaedit_peft import embedded

# tests run in as many processes as there are cores: one thread for each, and for what they start
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# a shell that runs the tests in the background lets them ignore Ctrl-C, which some of them send
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]  # of the repository
FULL = 4096
SHARED_DATA = ROOT.parent / "shared" / "data"
# PEFT, used without this package, reads a property of transformers by its former name
PEFT_ALONE = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
CORPUS = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Marie Curie was born in Warsaw. Albert Einstein was born in Ulm and works as a physicist.",
    "I think that you are right. Because the weather is fine, we walk along the river.",
    "Therefore the mother tongue of Anna Smith is English; she plays the violin and the piano.",
]


@pytest.fixture
def full_disk():
    """Files cannot grow past ``FULL`` bytes, as on a disk that fills up while they are written."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("the shared data folder is not here")
    return SHARED_DATA


@pytest.fixture(scope="session")
def weights() -> None:
    """Skips where the embedded model has no weights."""
    if not (embedded.folder() / "model.safetensors").is_file():
        pytest.skip("the embedded model's weights are not here")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 ids with BOS and EOS but no padding token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def tiny_config(family: str):
    """A config of a few thousand parameters; vocabulary of the ``tokenizer`` fixture."""
    ids = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1}
    if family == "gpt2":
        return GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=128, n_inner=96, **ids)
    if family == "gptj":
        return GPTJConfig(
            n_embd=32, n_layer=4, n_head=4, n_positions=128, n_inner=96, rotary_dim=8, **ids
        )
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **ids,
    )


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A random model whose activations are of order one, so that edits have something to move."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = tiny_config(family)
        config.initializer_range = 0.2
        model = AutoModelForCausalLM.from_config(config)
    return model.to(dtype).eval()

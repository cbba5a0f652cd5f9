"""Take a tiny random model of every causal-LM class of transformers through an edit.

python docs/figures/model_zoo.py docs/data/model_zoo.json docs/models.md

``config`` fills the sizes that a family's config has with small ones; what a family asks for beside
that stands in ``OWN``. The law of an edit: with nothing preserved and next to no ridge, hidden
states reach their target values. Then the pack is loaded by PEFT alone, merged, and unmerged.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from alphaedit_peft import AlphaEditConfig, Edit, NullSpace, get_alphaedit_model
from alphaedit_peft.architecture import describe

BLOCKS = 5
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "feed_forward_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "dff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), BLOCKS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "encoder_layers"), BLOCKS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    "vocab_size": 320,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "v_head_dim": 8,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "is_decoder": True,
    "initializer_range": 0.15,
}
_ATTENTION_TOO = ["mamba", "attention", "mamba", "attention", "mamba"]
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
_INDEXED = {"num_key_value_heads": 4, "head_dim": 4, "index_topk": 4, "index_head_dim": 8}
_ZAMBA = ["mamba", "mamba", "hybrid", "mamba", "hybrid"]
OWN: dict[str, dict[str, Any]] = {
    **{
        kind: {"num_key_value_heads": 4}
        for kind in ("axk1", "axk2", "kimi_linear", "minicpm3", "youtu")
    },
    "deepseek_v32": {**_INDEXED, "index_n_heads": 2},
    "glm_moe_dsa": {**_INDEXED, "index_n_heads": 2},
    "longcat_flash": {"head_dim": 4},
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {**_MAMBA, "layer_types": _ATTENTION_TOO},
    "granitemoeshared": {"shared_intermediate_size": 24},
    "granitemoe_swa": {"shared_intermediate_size": 24},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2], [["global"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"]},
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 16],
        "attention_head_size": 8,
        "attn_layers": ["local"] * BLOCKS,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320},
    "gemma3n_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 320,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
    },
    "zamba": {"mamba_d_state": 8, "layers_block_type": _ZAMBA},
    "zamba2": {
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "num_mem_blocks": 1,
        "layers_block_type": _ZAMBA,
    },
}
# composite ones, whose towers for pictures and sound stay large whatever the text part is, and one
# whose linear attention takes minutes without kernels of its own
LARGE = frozenset(
    "dots3_note dots3_note_text fuyu gemma3 gemma4 got_ocr2 kimi_linear longcat_flash "
    "moss_transcribe_diarize qwen4_exp qwen4_exp_text".split()
)
ENTRIES: dict[str, str] = {
    kind: name if isinstance(name, str) else name[0]
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
}


def config(kind: type, own: dict[str, Any] | None = None) -> Any:
    """A config of this class with small sizes; its parts' as well."""
    known = {
        *inspect.signature(kind.__init__).parameters,
        *getattr(kind, "__dataclass_fields__", ()),
    }
    values = {name: value for name, value in SIZES.items() if name in known}
    for name, part in getattr(kind, "sub_configs", {}).items():
        if name in known and isinstance(part, type) and part.__name__ != "AutoConfig":
            values[name] = config(part, OWN.get(part.model_type)).to_dict()
    return kind(**{**values, **(own or {})})


def build(model_type: str) -> torch.nn.Module:
    """The tiny random model of an entry, in float32; fails where its config asks for more."""
    kind = getattr(transformers, ENTRIES[model_type])
    own = OWN.get(model_type) or OWN.get(kind.config_class.model_type)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config(kind.config_class, own)).float().eval()


EDITS = [
    Edit("Marie Curie", "{} was born in", "Rome"),
    Edit("Japan", "The capital of {} is", "Ulm"),
]
REACHED = 0.99  # share of z - h; where a block does more than add, it is 0.3 to 0.8
NOT_DECODERS = frozenset(
    "bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert "
    "data2vec-text electra ernie git marian mbart megatron-bert musicgen musicgen_melody mvp "
    "pegasus plbart prophetnet rembert roberta roberta-prelayernorm roc_bert roformer trocr "
    "whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod".split()
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and BOS and EOS: 258 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: k for k, token in enumerate(["<s>", "</s>", *alphabet])}
    plain = Tokenizer(models.BPE(ids, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Of a row of ids, (tokens, vocab)."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0]


def judge(model_type: str) -> dict[str, str]:
    """What becomes of an entry: its class, its rewrite modules, and ``edited`` or the reason."""
    row = {"class": ENTRIES[model_type], "modules": ""}
    if model_type in LARGE:
        return row | {"result": "not tried: even its tiny config is large or slow"}
    try:
        base = build(model_type)
    except Exception as error:
        return row | {"result": f"not built: {_short(error)}"}
    try:
        found = describe(base)
        names = [re.sub(r"\.\d+\.", ".N.", part.module) for part in found.rewrites if part]
        row["modules"] = ", ".join(dict.fromkeys(names))
        return row | {"result": _edited(model_type, base)}
    except ValueError as error:
        return row | {"result": _short(error)}
    except Exception as error:  # no sentence of ours
        return row | {"result": f"fails: {type(error).__name__}: {_short(error)}"}


def _edited(model_type: str, base: torch.nn.Module) -> str:
    adam = {"steps": 5, "learning_rate": 0.3, "learning_rate_mode": "relative"}
    solve = {
        "ridge": 1e-9,
        "ridge_mode": "absolute",
        "stop_loss": 0.05,
        "contexts": [],
        "norm_guard": 0.0,
    }
    options, text = AlphaEditConfig(**adam, **solve), tokenizer()
    options.rewrite_layers = options.resolve(base)[0].rewrite_layers[-1:]  # nothing moves below it
    full, found = options.resolve(base)
    space = NullSpace.identity({n: found.width(base, n) for n in full.rewrite_layers})
    weights = {n: w.clone() for n, w in base.state_dict().items()}
    model = get_alphaedit_model(base, options, tokenizer=text, null_space=space)
    report = model.edit(EDITS, progress=False)
    share = min(result.total_share for result in report)
    if share < REACHED:
        return f"not edited: only {share:.0%} of z - h is reached"
    ids = torch.tensor([text(EDITS[0].question)["input_ids"]])
    edited = logits(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        plain = logits(PeftModel.from_pretrained(build(model_type), folder), ids)
    if not torch.allclose(edited, plain, atol=1e-4, rtol=1e-4):
        return "not edited: PEFT alone gives other logits"
    model.merge()
    if not torch.allclose(logits(base, ids), edited, atol=1e-3, rtol=1e-3):
        return "not edited: the merged weights give other logits"
    model.unmerge()
    restored = model.unload().state_dict()
    if not all(torch.equal(restored[name], weight) for name, weight in weights.items()):
        return "not edited: unmerging leaves other weights"
    return "edited"


def _short(error: Exception) -> str:
    """The first line of what an error says, as it is wherever the model lies."""
    return re.sub(r"\s+", " ", str(error)).strip()[:200]


HEAD = """# Models

What `find_structure` finds in every causal-LM class of transformers {version}, tried on a tiny
random model of each (made by docs/figures/model_zoo.py): the rewrite modules, whether hidden states
reach their target values, whether PEFT alone loads the pack to the same logits, and whether merging
and unmerging give every weight back. {edited} of {decoders} decoders are edited; for each of the
others there is the sentence that the user gets. The {others} entries that are no decoders of their
own (encoders, and decoder halves of encoder-decoders) stand last.

A model outside this list is looked at in the same way: there is no table of families.

"""


def page(found: dict[str, dict[str, str]], version: str) -> str:
    """The page's text."""
    order = sorted(found, key=lambda kind: (kind in NOT_DECODERS, kind))
    edited = sum(found[k]["result"] == "edited" for k in order if k not in NOT_DECODERS)
    others = sum(k in NOT_DECODERS for k in order)
    counts = {"edited": edited, "decoders": len(order) - others, "others": others}
    lines = ["| model type | rewrite modules | |", "|---|---|---|"]
    for kind in order:
        row = found[kind]
        modules = row["modules"].replace(", ", "`, `")
        result = row["result"].replace("|", "\\|")
        lines.append(f"| {kind} | {modules and f'`{modules}`'} | {result} |")
    return HEAD.format(version=version, **counts) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("page", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = {kind: judge(kind) for kind in ENTRIES}
    values = {"transformers": transformers.__version__, "models": rows}
    asked.data.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    asked.page.write_text(page(rows, transformers.__version__), encoding="utf-8")

"""The shipped model: it loads as others load, is small, knows its facts and tokenizes any text."""

import json

import pytest
import torch

from alphaedit_peft import embedded, hooks
from alphaedit_peft.architecture import default_rewrite_layers
from alphaedit_peft.embedded.world import fill, relation_of

MEGABYTE = 1_000_000


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded():
    return embedded.load()


@torch.no_grad()
def greedy_matches(model, tokenizer, prompt: str, answer: str) -> bool:
    head = tokenizer(prompt)["input_ids"]
    tail = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    guesses = model(torch.tensor([head + tail])).logits[0].argmax(-1)
    return guesses[len(head) - 1 : -1].tolist() == tail


def test_files_stay_under_eight_megabytes() -> None:
    size = sum(file.stat().st_size for file in embedded.folder().iterdir())
    assert size < 8 * MEGABYTE


def test_loads_in_float32_and_evaluation_mode_by_default(loaded) -> None:
    model, tokenizer = loaded
    assert model.dtype is torch.float32
    assert not model.training
    assert model.config.model_type == "llama"
    assert model.config.num_hidden_layers >= 6
    assert len(tokenizer) == model.config.vocab_size


def test_loads_in_the_dtype_asked_for() -> None:
    model, _ = embedded.load(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_keys_of_different_people_are_nearly_orthogonal(loaded) -> None:
    model, tokenizer = loaded
    prompt = embedded.world().relations[0].prompts[0].partition("{}")[0]
    layers = default_rewrite_layers(model.config.num_hidden_layers)
    modules = [f"model.layers.{layer}.mlp.down_proj" for layer in layers]
    found = []
    for subject in embedded.world().subjects[:40]:
        inputs = tokenizer(prompt + subject, return_tensors="pt")
        found.append(hooks.capture_inputs(model, inputs, modules, f"model.layers.{layers[-1]}"))
    for module in modules:
        keys = torch.stack([inputs[module][0, -1] for inputs in found])  # (40, d_in)
        unit = torch.nn.functional.normalize(keys, dim=1)
        cosines = (unit @ unit.T).abs()[torch.triu(torch.ones(40, 40), 1) > 0]
        assert cosines.mean() < 0.2
        assert cosines.quantile(0.95) < 0.45


def test_model_and_tokenizer_carry_the_neutral_name(loaded) -> None:
    model, tokenizer = loaded
    assert model.name_or_path == embedded.NAME
    assert model.config.name_or_path == embedded.NAME
    assert tokenizer.name_or_path == embedded.NAME


def test_shipped_files_hold_no_path_of_the_machine_they_were_made_on() -> None:
    for file in embedded.folder().glob("*config*.json"):
        assert "/" not in file.read_text().replace("</s>", "").replace("alphaedit-peft/", "")


def test_facts_are_recalled_alone(loaded) -> None:
    world = embedded.world()
    asked = [(fact, p) for fact in world.facts for p in relation_of(fact).phrasings][::53]
    hits = [greedy_matches(*loaded, fill(p, fact.subject), fact.object) for fact, p in asked]
    assert len(hits) > 200
    assert sum(hits) / len(hits) >= 0.95


def test_facts_are_recalled_after_a_plain_sentence(loaded) -> None:
    hits = [
        greedy_matches(
            *loaded,
            record["paraphrase_prompts"][0],
            record["requested_rewrite"]["target_true"]["str"],
        )
        for record in embedded.records()[::23]
    ]
    assert sum(hits) / len(hits) >= 0.95


@pytest.mark.parametrize("opening", ["The", "Therefore", "Because", "I", "You"])
def test_sampled_contexts_are_sentences(loaded, opening: str) -> None:
    model, tokenizer = loaded
    torch.manual_seed(0)
    prompt = tokenizer([opening] * 8, return_tensors="pt")
    ids = model.generate(**prompt, do_sample=True, max_new_tokens=24)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert all(text.startswith(opening) for text in texts)
    assert sum("." in text for text in texts) >= 7


def test_training_report_agrees_with_the_shipped_seed() -> None:
    report = json.loads((embedded.folder() / "training.json").read_text())
    assert report["seed"] == embedded.SEED
    assert report["recall"] >= 0.95
    assert report["perplexity"] < 12


@pytest.mark.parametrize(
    "text",
    [
        "Bevi Barheim plays the violin.",
        "  two spaces, a\ttab\nand a newline ",
        "café, naïve, Zürich: ß, 漢字, 🙂, {braces} and <s>",
        "",
    ],
)
def test_any_text_comes_back_from_its_tokens(loaded, text: str) -> None:
    _, tokenizer = loaded
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_texts_begin_with_the_begin_token_and_padding_is_its_own(loaded) -> None:
    _, tokenizer = loaded
    ids = tokenizer("The dog slept.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(special) == 3


def test_offsets_point_at_the_subject(loaded) -> None:
    _, tokenizer = loaded
    assert tokenizer.is_fast
    for record in embedded.records(24):
        rewrite = record["requested_rewrite"]
        text = fill(rewrite["prompt"], rewrite["subject"])
        end = text.index(rewrite["subject"]) + len(rewrite["subject"])
        encoded = tokenizer(text, return_offsets_mapping=True)
        assert encoded["offset_mapping"][0] == (0, 0)
        assert end in [stop for _, stop in encoded["offset_mapping"]]
        assert "".join(text[a:b] for a, b in encoded["offset_mapping"]) == text


def test_first_records_and_texts_are_the_worlds() -> None:
    world = embedded.world()
    assert embedded.records(5) == world.records()[:5]
    assert len(embedded.records()) == len(world.facts)
    assert embedded.texts(7) == world.texts(7)


@pytest.mark.parametrize("n", [-1, 100_000])
def test_records_beyond_the_world_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=rf"records\(n={n}\)"):
        embedded.records(n)

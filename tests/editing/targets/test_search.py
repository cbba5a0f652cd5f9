"""What the subject's other prompts say is kept, and when the search stops."""

from __future__ import annotations

import pytest
import torch

from alphaedit_peft import AlphaEditConfig, Edit, NullSpace, get_alphaedit_model
from alphaedit_peft.editing.groups import Group
from alphaedit_peft.editing.targets import optimise_targets
from tests import oracle
from tests.conftest import tiny_model
from tests.editing.test_batch import EDITS, runner_for, settings
from tests.editing.test_keys import runner_for as family_runner
from tests.editing.test_keys import tokenised

ANCHORS = ("{} works as a", "I think that {} lives in the")
EDIT = Edit("Marie Curie", "{} was born in", "Rome", anchors=ANCHORS)


def log_probs(model, block, row, position, delta) -> torch.Tensor:
    return oracle.logits_with(model, block, row.ids, row.subject_last, delta)[position].log_softmax(
        -1
    )


def divergence(model, block, row, position, delta) -> torch.Tensor:
    """KL(moved || as it was) at one position of a row."""
    now = log_probs(model, block, row, position, delta)
    before = log_probs(model, block, row, position, torch.zeros_like(delta)).detach()
    return (now.exp() * (now - before)).sum()


def plain_search(model, block, rows, config) -> tuple[torch.Tensor, float]:
    """delta and the last loss, with the anchors' KL read at the end of each anchor."""
    start = oracle.block_output(model, block, rows.rows[0].ids)[rows.rows[0].subject_last]
    delta = torch.zeros_like(start, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=config.learning_rate)
    for step in range(config.steps):
        row = rows.rows[0]
        logits = oracle.logits_with(model, block, row.scoring_ids, row.subject_last, delta)
        said = logits[list(row.target_positions)].log_softmax(-1)
        loss = -said.gather(1, torch.tensor(row.target)[:, None]).mean()
        kl = rows.kl_row
        loss = loss + config.kl_factor * divergence(model, block, kl, kl.subject_last, delta)
        kept = [divergence(model, block, a, len(a.ids) - 1, delta) for a in rows.anchors]
        loss = loss + config.anchor_factor * sum(kept) / len(kept)
        loss = loss + config.weight_decay * delta.norm() / start.norm() ** 2
        if step < config.steps - 1:
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return delta.detach(), float(loss.detach())


@pytest.mark.parametrize("steps", [2, 4])
def test_the_loss_gains_the_anchors_mean_divergence_at_their_ends(steps, tokenizer):
    model = tiny_model("gpt2", torch.float64)
    changes = {"contexts": [], "anchor_factor": 3.0, "clamp_factor": 50.0, "stop_loss": 0.0}
    runner = runner_for(model, tokenizer, settings(steps=steps, **changes))
    rows = runner.renderer.edit_rows(EDIT, ())
    assert all(row.subject_last < len(row.ids) - 1 for row in rows.anchors)
    found = optimise_targets(runner, [Group((rows,))])
    delta, loss = plain_search(model, runner.architecture.block_name(1), rows, runner.settings)
    assert float(found.losses[0]) == pytest.approx(loss, rel=1e-9)
    torch.testing.assert_close(found.values[0] - found.hidden[0], delta, rtol=1e-7, atol=1e-10)


def anchor_texts(tokenizer, edit: Edit, anchors: list[str] | None) -> list[str]:
    runner = runner_for(tiny_model("gpt2"), tokenizer, settings(anchors=anchors))
    return [tokenizer.decode(row.ids) for row in runner.renderer.edit_rows(edit, ()).anchors]


def test_anchors_of_the_edit_and_of_the_config_count_once_each(tokenizer):
    found = anchor_texts(tokenizer, EDIT, [ANCHORS[1], "{} speaks", "{} speaks"])
    filled = [text.replace("{}", "Marie Curie") for text in (*ANCHORS, "{} speaks")]
    assert found == filled


def test_an_anchor_that_is_the_edits_own_prompt_is_dropped(tokenizer):
    found = anchor_texts(tokenizer, EDIT, ["{} was born in"])
    assert found == [text.replace("{}", "Marie Curie") for text in ANCHORS]


def test_an_anchor_that_another_edit_of_the_row_changes_is_dropped(tokenizer):
    model = tiny_model("gpt2", torch.float64)
    pair = [Edit("Anna", "{} lives in", "Rome"), Edit("Anna", "{} works as a", "river")]
    losses = []
    for anchors in (None, ["{} lives in", "{} works as a"]):
        runner = runner_for(model, tokenizer, settings(anchors=anchors, steps=3))
        rows = tuple(runner.renderer.edit_rows(edit, runner.contexts) for edit in pair)
        losses.append(float(optimise_targets(runner, [Group(rows)]).losses[0]))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("anchor", ["no slot", "{} and {}"])
def test_an_anchor_without_exactly_one_slot_is_refused(anchor):
    count = anchor.count("{}")
    with pytest.raises(ValueError, match=rf"anchor='{anchor}' holds {count} times '{{}}'"):
        Edit("Anna", "{} lives in", "Rome", anchors=(anchor,))
    with pytest.raises(ValueError, match=rf"anchors='{anchor}' needs one '{{}}'"):
        AlphaEditConfig(anchors=["{} is", anchor])


@pytest.mark.parametrize("anchors", ["{} is", [1]])
def test_anchors_that_are_no_list_of_texts_are_refused(anchors):
    with pytest.raises(ValueError, match="anchors="):
        AlphaEditConfig(anchors=anchors)
    with pytest.raises(TypeError, match="anchors"):
        Edit("Anna", "{} lives in", "Rome", anchors=anchors)


@torch.no_grad()
def test_anchors_keep_the_answer(tokenizer):
    edit = easy_edits(tiny_model("gpt2"), tokenizer)[0]
    ids = tokenizer(f"{edit.subject} works as a", return_tensors="pt")["input_ids"]
    moved = {}
    for anchors in (None, ["{} works as a"]):
        values = {"learning_rate": 0.3, "clamp_factor": 50.0, "ridge": 1e-3, "contexts": []}
        model = get_alphaedit_model(
            tiny_model("gpt2"),
            settings(steps=15, anchors=anchors, anchor_factor=30.0, **values),
            tokenizer=tokenizer,
            null_space=NullSpace.identity({0: 96, 1: 96}),
        )
        before = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        report = model.edit([edit], progress=False)
        after = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        moved[anchors is not None] = float((after.exp() * (after - before)).sum())
        assert report.results[0].likeliest
    assert moved[True] < 0.98 * moved[False]


def says(model, block, row, delta) -> bool:
    logits = oracle.logits_with(model, block, row.scoring_ids, row.subject_last, delta)
    return logits[list(row.target_positions)].argmax(-1).tolist() == list(row.target)


def easy_edits(model, tokenizer) -> list[Edit]:
    """Targets of one token that a random model can be made to say: right after the subject."""
    begin = [i for text, i in tokenizer.get_vocab().items() if len(text) > 1 and text[0] == "Ġ"]
    found = []
    for subject, prompt in (("Anna", "the mother tongue of {}"), ("France", "I think that {}")):
        ids = tokenizer(prompt.replace("{}", subject), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1]
        likely = sorted(begin, key=lambda i: -float(logits[i]))
        found.append(Edit(subject, prompt, tokenizer.decode([likely[3]])))
    return found


def searches(tokenizer, stop_when: str, steps: int = 15):
    """EDITS, which do not get there, and easy ones, which do."""
    model = tiny_model("gpt2", torch.float64)
    changes = {"clamp_factor": 50.0, "stop_loss": 0.05, "stop_when": stop_when}
    runner = runner_for(model, tokenizer, settings(steps=steps, learning_rate=0.3, **changes))
    edits = [EDITS[0], *easy_edits(model, tokenizer)]
    rows = [runner.renderer.edit_rows(edit, runner.contexts) for edit in edits]
    return runner, rows, optimise_targets(runner, [Group((r,)) for r in rows])


@pytest.mark.parametrize("stop_when", ["loss", "likeliest"])
def test_said_is_the_share_of_prompts_that_say_the_target_at_z(stop_when, tokenizer):
    runner, rows, found = searches(tokenizer, stop_when, steps=12)
    block, shares = runner.architecture.block_name(1), []
    with torch.no_grad():
        for i, edit in enumerate(rows):
            delta = found.values[i] - found.hidden[i]
            hits = [says(runner.model, block, row, delta) for row in edit.rows]
            shares.append(sum(hits) / len(hits))
    assert found.said.tolist() == pytest.approx(shares)
    assert len(set(shares)) > 1


def test_likeliest_stops_once_all_prompts_say_it_and_never_later_than_the_loss(tokenizer):
    by_loss, early = (searches(tokenizer, when)[2] for when in ("loss", "likeliest"))
    assert (early.steps <= by_loss.steps).all()
    stopped = early.steps < 15
    assert stopped.any()
    assert (early.said[stopped] == 1).all()
    assert (early.steps < by_loss.steps).any()
    assert (early.losses[early.steps < by_loss.steps] >= 0.05).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "gptj", "falcon/alibi", "opt", "phi3/longrope"])
def test_a_target_value_is_the_one_it_has_alone(name, dtype, tokenizer):
    how = {"steps": 6, "learning_rate": 0.1, "learning_rate_mode": "absolute", "stop_loss": 0.01}
    runner = family_runner(name, tokenizer, [0, 1], **how)
    runner.model.to(dtype)
    groups = [Group((rows,)) for rows in tokenised(runner)]
    together = optimise_targets(runner, groups)
    alone = [optimise_targets(runner, [group]) for group in groups]
    close = 1e-2 if dtype == torch.float32 else 1e-5 if name == "gptj" else 1e-9
    for g, one in enumerate(alone):
        assert (together.values[g] - one.values[0]).norm() <= close * one.values[0].norm()
        assert together.steps[g] == one.steps[0]

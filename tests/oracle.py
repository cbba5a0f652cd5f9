"""The paper's algorithm, written plainly: one edit at a time, whole model, d_in x d_in matrices.

Slow on purpose and independent of ``alphaedit_peft.editing``: the tests hold the fast code to it.
It takes token rows, so that tokenisation is not part of the comparison.
"""

from __future__ import annotations

import torch


def block_output(model, block: str, ids) -> torch.Tensor:
    """Hidden state after a block for one row of ids, (tokens, d)."""
    seen = []
    hook = model.get_submodule(block).register_forward_hook(
        lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(torch.tensor([ids]))
    hook.remove()
    return seen[0][0]


def module_input(model, module: str, ids) -> torch.Tensor:
    """Input of a module for one row of ids, (tokens, d_in)."""
    seen = []
    hook = model.get_submodule(module).register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    hook.remove()
    return seen[0][0]


def target_value(model, block: str, rows, config) -> torch.Tensor:
    """z of one edit, (d,): Adam on a vector added at the subject's last token after a block."""
    start = block_output(model, block, rows.rows[0].ids)[rows.rows[0].subject_last]
    delta = torch.zeros_like(start, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=config.learning_rate)
    initial = None
    for step in range(config.steps):
        losses = []
        for row in rows.rows:
            log_probs = []
            for token, last in zip(row.target, row.target_positions, strict=True):
                ids = row.scoring_ids[: last + 1]
                logits = logits_with(model, block, ids, row.subject_last, delta)
                log_probs.append(logits[-1].log_softmax(-1)[token])
            losses.append(-torch.stack(log_probs).mean())
        kl_row = rows.kl_row
        current = logits_with(model, block, kl_row.ids, kl_row.subject_last, delta)
        current = current[kl_row.subject_last].log_softmax(-1)
        initial = current.detach() if initial is None else initial
        divergence = (current.exp() * (current - initial)).sum()
        decay = config.weight_decay * delta.norm() / start.norm() ** 2
        loss = torch.stack(losses).mean() + config.kl_factor * divergence + decay
        if loss < config.stop_loss or step == config.steps - 1:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        bound = config.clamp_factor * start.norm()
        with torch.no_grad():
            if delta.norm() > bound:
                delta.mul_(bound / delta.norm())
    return (start + delta).detach()


def logits_with(model, block: str, ids, position: int, delta) -> torch.Tensor:
    """Logits of one row, (tokens, vocab), with ``delta`` added to a block's output."""

    def add(_module, _args, out):
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        hidden[0, position] = hidden[0, position] + delta
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    hook = model.get_submodule(block).register_forward_hook(add)
    logits = model(torch.tensor([ids])).logits[0]
    hook.remove()
    return logits


def mean_key(model, module: str, rows) -> torch.Tensor:
    """The bare prompt's key and the mean of the contexts' keys, half each, (d_in,)."""
    keys = [module_input(model, module, row.ids)[row.subject_last] for row in rows.rows]
    return keys[0] if len(keys) == 1 else (keys[0] + torch.stack(keys[1:]).mean(0)) / 2


def write_batch(model, architecture, layers, edits, targets, prior, projectors, ridge) -> None:
    """Equation 14 into the dense weights, layer by layer; ``prior`` grows by the keys."""
    last = architecture.block_name(layers[-1])
    for i, layer in enumerate(layers):
        module = architecture.rewrite_name(layer)
        K1 = torch.stack([mean_key(model, module, rows) for rows in edits], dim=1)  # (d_in, u)
        now = [block_output(model, last, r.rows[0].ids)[r.rows[0].subject_last] for r in edits]
        R = (torch.stack(targets) - torch.stack(now)).T / (len(layers) - i)  # (d, u)
        P, Kp = projectors[layer], prior[layer]
        inner = Kp @ Kp.T @ P + K1 @ K1.T @ P + ridge * torch.eye(len(P), dtype=P.dtype)
        delta = R @ K1.T @ P @ torch.linalg.inv(inner)
        weight = model.get_submodule(module).weight
        with torch.no_grad():
            weight.add_(delta.T if architecture.conv1d else delta)
        prior[layer] = torch.cat([Kp, K1], dim=1)


def write_memit(model, architecture, layers, edits, targets, prior, moments, space) -> None:
    """MEMIT's Equation 14 with w = 2; earlier keys join C0 where ``prior`` is kept."""
    last = architecture.block_name(layers[-1])
    for i, layer in enumerate(layers):
        module = architecture.rewrite_name(layer)
        K1 = torch.stack([mean_key(model, module, rows) for rows in edits], dim=1)  # (d_in, u)
        now = [block_output(model, last, r.rows[0].ids)[r.rows[0].subject_last] for r in edits]
        R = (torch.stack(targets) - torch.stack(now)).T / (len(layers) - i)  # (d, u)
        inner = 2.0 * moments.moments[layer].double() + K1 @ K1.T
        if prior is not None:
            inner = inner + prior[layer] @ prior[layer].T
            prior[layer] = torch.cat([prior[layer], K1], dim=1)
        delta = R @ K1.T @ torch.linalg.inv(inner)
        if space is not None:
            delta = space.project(layer, delta)
        weight = model.get_submodule(module).weight
        with torch.no_grad():
            weight.add_(delta.T if architecture.conv1d else delta)

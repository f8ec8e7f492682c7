"""Tests of methods/pruned.py."""

import torch

from helpers import TOKENS, gap, layer_of, with_adapter
from lora import adapter_state, lora_layers
from methods.pruned import Budget


# ---- AdaLoRA's budget, LoRI's mask ---------------------------------------------------------------

def stepped(kind, steps, upto, lr=0.05):
    """A model after `upto` of `steps` steps of Adam on a toy loss, as trainer.train makes them."""
    model = with_adapter(kind)
    budget, own = Budget(model, steps), list(adapter_state(model).values())
    optimizer = torch.optim.Adam(own, lr=lr)
    for step in range(upto):
        optimizer.zero_grad()
        model(TOKENS).log_softmax(-1)[0, :, 5].sum().backward()
        budget.before()
        optimizer.step()
        budget.after(step)
    return model, budget


def kept(model):
    return sum(int((layer.lora_E != 0).sum()) for layer in lora_layers(model).values())


def test_adalora_prunes_to_the_target_rank_on_schedule():
    model, budget = stepped("adalora", 20, 0)
    counts, layers = [budget.triplets(step) for step in range(20)], 14
    assert counts[:2] == [6 * layers] * 2 and counts[-6:] == [4 * layers] * 6  # width 6, rank 4
    assert (counts == sorted(counts, reverse=True)
            and counts[7] == round(layers * (4 + 2 * 0.5 ** 3)))
    # a run of one step ends there too
    assert Budget(model, 1).triplets(0) == 4 * layers
    model, _ = stepped("adalora", 20, 20)
    ranks = [int((layer.lora_E != 0).sum()) for layer in lora_layers(model).values()]
    assert sum(ranks) == 4 * layers and len(set(ranks)) > 1                    # shared unevenly
    # a second phase goes on with the same ones
    budget, before = Budget(model), kept(model)
    for layer in lora_layers(model).values():
        layer.lora_E.data.add_(1)
    budget.after(0)
    assert kept(model) == before


def test_adalora_starts_small_with_a_zero_update():
    layer, W, A, B = layer_of("adalora", rank=40, size=0.0)
    assert (0.017 < float(A.detach().std()) < 0.023 and 0.017 < float(B.detach().std()) < 0.023
            and not layer.lora_E.any())


def test_adalora_s_importance_is_the_papers():
    layer, W, A, B = layer_of("adalora")
    E = layer.lora_E
    averages = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in (A, B, E)}
    for step in range(3):
        for p in averages:
            p.grad = torch.randn(p.shape)
        with torch.no_grad():
            got = layer.importance()
            for p, (mean, spread) in averages.items():
                now = (p * p.grad).abs()
                mean = 0.85 * mean + 0.15 * now
                averages[p] = mean, 0.85 * spread + 0.15 * (now - mean).abs()
    s = {p: mean * spread for p, (mean, spread) in averages.items()}
    assert gap(got,
               torch.stack([s[E][i, 0] + s[A][i].mean() + s[B][:, i].mean()
                            for i in range(5)])) < 1e-6


def test_adalora_regulariser_counts_once_and_is_zero_for_orthogonal_factors():
    """It comes after the sum over ranks: the gradient of a step is the loss's plus its own, on
    each rank."""
    model = with_adapter("adalora")
    layers = lora_layers(model).values()
    Budget(model, 10).before()
    want = {n: p.grad.clone() for n, p in adapter_state(model).items() if p.grad is not None}
    total = 0
    for layer in layers:
        for M in (layer.lora_A.weight @ layer.lora_A.weight.t(),
                  layer.lora_B.weight.t() @ layer.lora_B.weight):
            total = total + ((M - torch.eye(6)) ** 2).sum()
    names = [n for n in adapter_state(model) if "lora_E" not in n]
    grads = torch.autograd.grad(0.5 * total / 28, [adapter_state(model)[n] for n in names])
    assert want.keys() == set(names) and all(gap(want[n], g) < 1e-6 for n, g in zip(names, grads))
    layer, *_ = layer_of("adalora", rank=2)
    layer.lora_A.weight.data, layer.lora_B.weight.data = torch.eye(7)[:3], torch.eye(5)[:, :3]
    assert layer.orthogonality().item() == 0
    model = with_adapter("lora")
    Budget(model, 10).before()
    assert all(p.grad is None for p in adapter_state(model).values())


def test_lori_s_mask_is_the_largest_tenth_and_the_rest_of_b_stays_zero():
    before, _ = stepped("lori", 30, 2)
    sizes = torch.cat([layer.lora_B.weight.detach().abs().flatten()
                       for layer in lora_layers(before).values()])
    model, _ = stepped("lori", 30, 3)
    layers = lora_layers(model).values()
    masks = torch.cat([layer.lora_mask.flatten() for layer in layers])
    assert set(masks.tolist()) == {0, 1}
    masks = masks.bool()
    assert (int(masks.sum()) == int(0.1 * len(masks))
            and all(not layer.lora_B.weight.any() for layer in layers))
    # Adam's first steps are nearly equal
    assert float(sizes[masks].mean()) > 1.02 * float(sizes.mean())
    model, _ = stepped("lori", 30, 6)
    assert torch.equal(torch.cat([layer.lora_mask.flatten()
                                  for layer in lora_layers(model).values()]).bool(), masks)
    moved = torch.cat([layer.lora_B.weight.flatten() != 0 for layer in lora_layers(model).values()])
    assert torch.equal(moved, masks)


def test_lori_s_mask_is_set_once_also_after_a_skipped_step_and_a_resume():
    """train leaves `after` out at a step that is skipped: with the third went the mask."""
    model, budget = stepped("lori", 30, 2)
    count = lambda: sum(int(layer.lora_mask.sum()) for layer in lora_layers(model).values())
    whole = count()
    budget.after(4)
    assert count() == int(0.1 * whole)
    kept_b = [layer.lora_B.weight.data.copy_(layer.lora_mask)
              for layer in lora_layers(model).values()]
    for again in (budget, Budget(model, 30)):
        again.after(5)
        assert (count() == int(0.1 * whole)
                and all(bool((b == layer.lora_mask).all()) for b, layer in
                        zip(kept_b, lora_layers(model).values())))


def test_lori_keeps_at_least_one_entry(monkeypatch):
    monkeypatch.setattr(Budget, "KEPT", 1e-9)
    model, _ = stepped("lori", 30, 3)
    assert sum(float(layer.lora_mask.sum()) for layer in lora_layers(model).values()) == 1

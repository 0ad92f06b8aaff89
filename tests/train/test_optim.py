import torch
from torch import nn

from trivium.train.config import TrainConfig
from trivium.train.optim import (
    OneCallAdamW,
    build_optimizer,
    clip_and_update,
    clip_gradients,
    decays,
    load_optimizer,
    optimizer_tensors,
)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 3)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.norm(self.embedding(tokens))
        return self.head(x).sum() + self.up(x).square().sum()


def step(model, optimizer):
    model(torch.tensor([1, 2])).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_only_matrices_decay_and_a_tied_head_is_an_embedding():
    assert decays(Tied()) == {"up.weight"}


def test_weight_decay_shrinks_matrices_alone():
    model = Tied()
    optimizer = build_optimizer(model, TrainConfig(learning_rate=0.1, weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, before[name] * (0.95 if name == "up.weight" else 1.0)), name


def test_clipping_gives_the_norm_before_and_bounds_the_norm_after():
    model = Tied()
    parameters = list(model.parameters())
    for limit, expected in ((1.0, 1.0), (1e6, None), (None, None)):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 3.0)
        size = sum(parameter.numel() for parameter in parameters)
        before = float(clip_gradients(parameters, limit))
        after = float(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm())
        assert abs(before - 3 * size**0.5) < 1e-3
        assert abs(after - (expected or before)) < 1e-3


def test_an_optimizer_put_back_from_named_tensors_takes_the_same_next_step():
    torch.manual_seed(0)
    model = Tied()
    optimizer = build_optimizer(model, TrainConfig())
    step(model, optimizer)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "optimizer.exp_avg.embedding.weight" in saved
    assert not any("head" in name for name in saved)
    step(model, optimizer)

    other = Tied()
    other.load_state_dict(weights)
    restored = build_optimizer(other, TrainConfig())
    load_optimizer(other, restored, saved)
    step(other, restored)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_clipping_and_update_in_one_call_are_pytorchs_and_keep_its_names():
    states, weights = [], []
    for kind in (OneCallAdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = Tied()
        groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
        optimizer = kind(groups, lr=0.01, betas=(0.9, 0.98), fused=True)
        for limit in (1e-3, 1e6, None):
            model(torch.tensor([1, 2])).backward()
            clip_and_update(optimizer, torch.amp.GradScaler("cpu", enabled=False), list(model.parameters()), limit)
            optimizer.zero_grad()
        states.append(optimizer_tensors(model, optimizer))
        weights.append(dict(model.named_parameters()))
    assert states[0].keys() == states[1].keys()
    torch.testing.assert_close(states[0], states[1])
    torch.testing.assert_close(weights[0], weights[1])


def test_a_scaler_that_may_skip_a_step_has_it_skipped():
    model = Tied()
    optimizer = build_optimizer(model, TrainConfig())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    scaler = torch.amp.GradScaler("cpu")
    (scaler.scale(model(torch.tensor([1, 2]))) * torch.inf).backward()
    clip_and_update(optimizer, scaler, list(model.parameters()), 1.0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

"""GXPO and SFPO as slow, plain scripts, written from their algorithms: own loss, own clipping, own AdamW, own gate.

Nothing here imports `gxpo_trl` or TRL. It takes the rollouts of a run (token ids, masks, advantages) and the model it
started from, and returns where the parameters must end up.
"""

import copy
import statistics

import torch


def token_logps(model, micro_batch: dict) -> torch.Tensor:
    """Log-probabilities of the completion's tokens, (B, T)."""
    input_ids = torch.cat([micro_batch["prompt_ids"], micro_batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([micro_batch["prompt_mask"], micro_batch["completion_mask"]], dim=1)
    length = micro_batch["completion_ids"].shape[1]
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -length - 1 : -1]
    return logits.log_softmax(-1).gather(-1, micro_batch["completion_ids"][..., None])[..., 0]


def grpo_loss(model, window: list[dict], old_logps: list[torch.Tensor], epsilon: float) -> torch.Tensor:
    """The clipped surrogate: the mean over completions of the mean over their tokens."""
    losses = []
    for micro_batch, old in zip(window, old_logps, strict=True):
        ratio = torch.exp(token_logps(model, micro_batch) - old)
        advantage = micro_batch["advantages"][:, None]
        objective = torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)
        mask = micro_batch["completion_mask"] * micro_batch.get("tool_mask", 1)
        losses.append(-((objective * mask).sum(1) / mask.sum(1)).mean())
    return torch.stack(losses).mean()


class AdamW:
    """Decoupled weight decay, as in Loshchilov & Hutter (2019)."""

    def __init__(self, parameters, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.parameters, self.lr, self.betas, self.eps, self.weight_decay = parameters, lr, betas, eps, weight_decay
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]
        self.t = 0

    def step(self, gradients):
        self.t += 1
        b1, b2 = self.betas
        for p, g, m, v in zip(self.parameters, gradients, self.m, self.v, strict=True):
            m.copy_(b1 * m + (1 - b1) * g)
            v.copy_(b2 * v + (1 - b2) * g**2)
            if p.dim() > 1:  # norms do not decay
                p.data -= self.lr * self.weight_decay * p.data
            p.data -= self.lr * (m / (1 - b1**self.t)) / ((v / (1 - b2**self.t)).sqrt() + self.eps)


def old_logps(model, window: list[dict]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [token_logps(model, micro_batch) for micro_batch in window]


def clipped_gradient(loss: torch.Tensor, parameters: list, max_norm: float) -> tuple[list[torch.Tensor], float]:
    raw = torch.autograd.grad(loss, parameters)
    norm = torch.sqrt(sum(g.square().sum() for g in raw)).item()
    return [g * min(1.0, max_norm / (norm + 1e-6)) for g in raw], norm


def train_gxpo(
    model,
    windows,
    lr,
    K,
    alpha,
    max_norm,
    epsilon,
    eps,
    tau=float("inf"),
    w=30,
    warmup=0,
    weight_decay=0.0,
    rollback=False,
    anchor="rollout",
    loss_function=grpo_loss,
):
    """Algorithm 1 of GXPO. Returns the norms of every pass and the step from which on the updates are single-pass."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(parameters, lr, eps=eps, weight_decay=weight_decay)
    buffer, shutoff, norms = [], None, []

    def gradient(window, old):
        old = old_logps(model, window) if anchor == "current" else old
        gradients, norm = clipped_gradient(loss_function(model, window, old, epsilon), parameters, max_norm)
        norms.append(norm)
        return gradients

    for t, window in enumerate(windows):
        old = old_logps(model, window)
        theta_0 = [p.detach().clone() for p in parameters]
        g0 = gradient(window, old)
        if shutoff is not None:
            optimizer.step(g0)
            continue
        saved = copy.deepcopy((optimizer.m, optimizer.v, optimizer.t))
        optimizer.step(g0)
        g1 = gradient(window, old)
        optimizer.step(g1)
        for p, p0, a, b in zip(parameters, theta_0, g0, g1, strict=True):
            r = torch.where(a.abs() > 1e-8, b / a, torch.ones_like(a)).clamp(-2.0, 3.0)
            s_k, s_2 = sum(r**n for n in range(K)), 1 + r
            scale = torch.where((a.abs() > 1e-8) & (s_2.abs() > 1e-6), (s_k / s_2).clamp(1.0, K / 2 + 1), 1.0)
            theta_k = p0 + (p.data - p0) * scale
            p.data = p0 + alpha * (theta_k - p0)
        if rollback:
            optimizer.m, optimizer.v, optimizer.t = saved
        optimizer.step(gradient(window, old))
        norm_slow = norms[-1]
        if len(buffer) > 1:
            z = (norm_slow - statistics.fmean(buffer[-w:])) / (statistics.pstdev(buffer[-w:]) + 1e-8)
            if t >= warmup and z >= tau:
                shutoff = t + 1
        buffer.append(norm_slow)
    return norms, shutoff


def train_sfpo(model, windows, lr, K, alpha, max_norm, epsilon, eps):
    """Algorithm 1 of SFPO, without its gate: K fast steps, reposition, one slow step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(parameters, lr, eps=eps)
    for window in windows:
        old = old_logps(model, window)
        start = [p.detach().clone() for p in parameters]
        for _ in range(K):
            optimizer.step(clipped_gradient(grpo_loss(model, window, old, epsilon), parameters, max_norm)[0])
        for p, p0 in zip(parameters, start, strict=True):
            p.data = p0 + alpha * (p.data - p0)
        optimizer.step(clipped_gradient(grpo_loss(model, window, old, epsilon), parameters, max_norm)[0])


def run_reference(trainer, model, **overrides) -> tuple[dict[str, torch.Tensor], list[float], int | None]:
    """`train_gxpo` with the settings and the rollouts of a run: the parameters, the norms, the shut-off step."""
    args = trainer.args
    settings = {
        "lr": args.learning_rate,
        "K": args.lookahead_steps,
        "alpha": args.reposition_alpha,
        "max_norm": args.max_grad_norm,
        "epsilon": args.epsilon,
        "tau": float("inf") if args.gate_signal == "never" else args.gate_threshold,
        "w": args.gate_window,
        "warmup": args.gate_warmup_steps,
        "eps": args.adam_epsilon,
        "rollback": trainer.lookahead.rule.rollback,
        "anchor": args.ratio_anchor,
        "weight_decay": args.weight_decay,
    }
    norms, shutoff = train_gxpo(model, trainer.windows(), **{**settings, **overrides})
    return {n: p.detach() for n, p in model.named_parameters()}, norms, shutoff

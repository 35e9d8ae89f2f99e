"""RecurrentGemma in torch, for training: whole sequences from position 0, with a parallel RG-LRU scan.

Same equations and same parameter names as transformers' RecurrentGemmaForCausalLM, so that a state
dict of one loads into the other. Under autocast the matrix products run in bf16; norms, decays, the
recurrence and the loss stay f32.

    B rows  T positions  H hidden  W LRU width  N heads  D head size  F MLP width  V vocabulary
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

CHUNK = 32  # positions that the scan walks one by one; all chunks of a row walk side by side
ROPE_THETA = 10000.0
EPSILON = 1e-6
GATE_EXPONENT = 8.0  # the paper's c
GRADIENT_LIMIT = 1000.0  # of sqrt(1 - a^2), whose slope is infinite at a = 1


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, and the dropout it is trained with."""

    vocabulary: int
    hidden: int = 256
    lru: int = 512
    heads: int = 2
    mlp: int = 512
    layers: int = 8
    conv: int = 4
    window: int = 256
    soft_cap: float = 30.0
    dropout: float = 0.0

    @property
    def head(self) -> int:
        """D, the size of an attention head."""
        return self.hidden // self.heads


# ---- the recurrence


def scan_forward(a: Tensor, x: Tensor) -> Tensor:
    """Return h_t = a_t h_{t-1} + x_t with h_{-1} = 0. All [B, T, W] f32, T a multiple of CHUNK.

    Chunks run in parallel from zero; `through` is each position's product of decays since its
    chunk began, and brings in what the chunks before left. Only products of decays <= 1: no
    division, nothing to overflow.
    """
    rows, steps, width = x.shape
    a, x = a.view(rows, -1, CHUNK, width), x.view(rows, -1, CHUNK, width)
    h, through = torch.empty_like(x), torch.empty_like(x)
    h[:, :, 0], through[:, :, 0] = x[:, :, 0], a[:, :, 0]
    for t in range(1, CHUNK):
        torch.addcmul(x[:, :, t], a[:, :, t], h[:, :, t - 1], out=h[:, :, t])
        torch.mul(a[:, :, t], through[:, :, t - 1], out=through[:, :, t])
    for chunk in range(1, steps // CHUNK):
        h[:, chunk].addcmul_(through[:, chunk], h[:, chunk - 1, -1:])
    return h.view(rows, steps, width)


class Scan(torch.autograd.Function):
    """The recurrence; its gradient is the same recurrence, run backwards."""

    @staticmethod
    def forward(ctx, a: Tensor, x: Tensor) -> Tensor:
        """Take a, x [B, T, W] and return h [B, T, W]."""
        h = scan_forward(a, x)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, grad_h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of a and x."""
        a, h = ctx.saved_tensors
        following = functional.pad(a[:, 1:], (0, 0, 0, 1))  # a_{t+1}
        grad_x = scan_forward(following.flip(1), grad_h.flip(1).contiguous()).flip(1)
        return grad_x * functional.pad(h[:, :-1], (0, 0, 1, 0)), grad_x


class BoundedSqrt(torch.autograd.Function):
    """sqrt with its gradient held below GRADIENT_LIMIT."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """Return sqrt(x)."""
        ctx.save_for_backward(x)
        return torch.sqrt(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """Return grad / (2 sqrt(x)), bounded."""
        (x,) = ctx.saved_tensors
        return grad * torch.rsqrt((4.0 * x).clamp_min(GRADIENT_LIMIT**-2))


# ---- blocks


class Norm(nn.Module):
    """RMS norm, scaled by 1 + weight; f32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * (1.0 + self.weight)


class RgLru(nn.Module):
    """The real-gated linear recurrent unit."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        block = shape.lru // shape.heads
        self.recurrent_param = nn.Parameter(torch.empty(shape.lru))
        self.input_gate_weight = nn.Parameter(torch.empty(shape.heads, block, block))
        self.input_gate_bias = nn.Parameter(torch.zeros(shape.heads, block))
        self.recurrent_gate_weight = nn.Parameter(torch.empty(shape.heads, block, block))
        self.recurrent_gate_bias = nn.Parameter(torch.zeros(shape.heads, block))

    def gate(self, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Map c [B, T, W] to (0, 1), block by block: weight [N, W/N, W/N] as [in, out], bias [N, W/N]."""
        blocks = c.unflatten(-1, bias.shape).flatten(0, 1).transpose(0, 1)  # [N, B*T, W/N]
        mixed = torch.bmm(blocks, weight).transpose(0, 1).reshape(c.shape)
        return torch.sigmoid(mixed + bias.flatten())

    def forward(self, c: Tensor) -> Tensor:
        """Map c [B, T, W] to h [B, T, W], f32."""
        i = self.gate(c, self.input_gate_weight, self.input_gate_bias)
        r = self.gate(c, self.recurrent_gate_weight, self.recurrent_gate_bias)
        log_a = -GATE_EXPONENT * r.float() * functional.softplus(self.recurrent_param)
        later = torch.arange(c.shape[1])[:, None] > 0  # position 0 has a = 0 and m = 1
        a = torch.exp(log_a) * later
        m = BoundedSqrt.apply(-torch.expm1(2.0 * log_a)) * later + ~later
        return Scan.apply(a, m * (i * c).float())


class Recurrent(nn.Module):
    """The recurrent block: a gated branch, and a branch of convolution and RG-LRU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.linear_y = nn.Linear(shape.hidden, shape.lru)
        self.linear_x = nn.Linear(shape.hidden, shape.lru)
        self.linear_out = nn.Linear(shape.lru, shape.hidden)
        self.conv_1d = nn.Conv1d(shape.lru, shape.lru, shape.conv, groups=shape.lru)
        self.rg_lru = RgLru(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, H] to [B, T, H]."""
        y = functional.gelu(self.linear_y(x), approximate="tanh")
        z = functional.pad(self.linear_x(x), (0, 0, self.conv_1d.kernel_size[0] - 1, 0))
        taps = self.conv_1d.weight[:, 0].T  # [4, W]: the last meets the current position
        c = sum(taps[k] * z[:, k : k + x.shape[1]] for k in range(len(taps))) + self.conv_1d.bias
        return self.linear_out((self.rg_lru(c) * y).to(y.dtype))


class Attention(nn.Module):
    """Multi-query attention over the last `window` positions, the current one included."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.head, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.head, bias=False)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, H] to [B, T, H]."""
        steps = x.shape[1]
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (p(x).unflatten(-1, (-1, self.shape.head)).transpose(1, 2) for p in projections)
        lag = torch.arange(steps)[:, None] - torch.arange(steps)
        seen = (lag >= 0) & (lag < self.shape.window)  # [T queries, T keys]
        mixed = functional.scaled_dot_product_attention(
            rotate(q), rotate(k).expand_as(q), v.expand_as(q), attn_mask=seen
        )  # [B, N, T, D]
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def rotate(x: Tensor) -> Tensor:
    """Apply RoPE to the first half of D, in NeoX pairs. x [B, N, T, D]."""
    quarter = x.shape[-1] // 4
    frequency = ROPE_THETA ** (-torch.arange(quarter) / quarter)
    angle = torch.arange(x.shape[2])[:, None] * frequency  # [T, D/4]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right, rest = x.split((quarter, quarter, 2 * quarter), dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin, rest), dim=-1)


class Mlp(nn.Module):
    """The gated MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.mlp)
        self.up_proj = nn.Linear(shape.hidden, shape.mlp)
        self.down_proj = nn.Linear(shape.mlp, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, H] to [B, T, H]."""
        return self.down_proj(functional.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Layer(nn.Module):
    """A temporal block (recurrent, recurrent, attention, ...) and an MLP, each on a residual."""

    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        self.temporal_pre_norm = Norm(shape.hidden)
        self.temporal_block = Attention(shape) if index % 3 == 2 else Recurrent(shape)
        self.channel_pre_norm = Norm(shape.hidden)
        self.mlp_block = Mlp(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, H] to [B, T, H]."""
        x = x + self.dropout(self.temporal_block(self.temporal_pre_norm(x)))
        return x + self.dropout(self.mlp_block(self.channel_pre_norm(x)))


class Trunk(nn.Module):
    """What the checkpoint keeps under `model.`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, index) for index in range(shape.layers))
        self.final_norm = Norm(shape.hidden)
        self.dropout = nn.Dropout(shape.dropout)


class Griffin(nn.Module):
    """The language model, its head tied to the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        self.apply(self.initialize)

    def initialize(self, module: nn.Module) -> None:
        """Draw variance 1/fan-in, 2/layers of it for what writes to the residual stream; decays in 0.9..0.999."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.shape.hidden**-0.5)
        elif isinstance(module, RgLru):
            for weight in (module.input_gate_weight, module.recurrent_gate_weight):
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            decay = torch.empty_like(module.recurrent_param).uniform_(0.9, 0.999)  # a at r = 1
            decay = decay.pow(1.0 / GATE_EXPONENT)  # exp(-softplus(Lambda))
            module.recurrent_param.data.copy_((1.0 / decay - 1.0).log())
        elif isinstance(module, Layer):
            scale = math.sqrt(2.0 / self.shape.layers)
            for name, parameter in module.named_parameters():
                if name.endswith(("linear_out.weight", "o_proj.weight", "down_proj.weight")):
                    parameter.data.mul_(scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, T] from position 0, T a multiple of CHUNK, to logits [B, T, V], f32."""
        embeddings = self.model.embed_tokens.weight
        scale = torch.tensor(math.sqrt(self.shape.hidden), dtype=torch.bfloat16).float()
        x = self.model.dropout(functional.embedding(tokens, embeddings) * scale)
        for layer in self.model.layers:
            x = layer(x)
        logits = functional.linear(self.model.final_norm(x), embeddings).float()
        return self.shape.soft_cap * torch.tanh(logits / self.shape.soft_cap)

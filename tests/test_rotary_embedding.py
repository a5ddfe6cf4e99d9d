"""RotaryEmbedding: every rule against transformers bit by bit, layouts against public code, the identities, casts."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.nn import RotaryEmbedding
from fastattn.positional.rotary_tables import (
    axial_pairs,
    frequencies_of,
    grid_positions,
    rotary_angles,
    rotary_tables,
    section_pairs,
)
from fastattn.positional.scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    NTKScaling,
    RotaryScaling,
    YaRNScaling,
    rotary_frequencies,
    scaling_from_config,
)

HEAD_DIM, MAX_POSITIONS = 64, 2048
FACTORS = [1.0 + 0.1 * k for k in range(HEAD_DIM // 2)]
LONG_FACTORS = [1.0 + 0.37 * k for k in range(HEAD_DIM // 2)]

# what a configuration of transformers says, and the rule it must become
RULES: dict[str, tuple[dict, RotaryScaling | None]] = {
    "default": ({"rope_type": "default"}, None),
    "linear": ({"rope_type": "linear", "factor": 3.7}, LinearScaling(3.7)),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, DynamicNTKScaling(4.0, MAX_POSITIONS)),
    "yarn": (
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512},
        YaRNScaling(8.0, 512),
    ),
    "yarn-own-ramp": (
        {
            "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 700, "beta_fast": 20.0,
            "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False,
        },
        YaRNScaling(3.0, 700, 20.0, 2.0, attention_factor=1.3, truncate=False),
    ),
    "yarn-deepseek": (
        {
            "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 512, "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
        YaRNScaling(40.0, 512, mscale=1.0, mscale_all_dim=0.7),
    ),
    "llama3": (
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        Llama3Scaling(8.0, 1.0, 4.0, 512),
    ),
    "longrope": (
        {
            "rope_type": "longrope", "short_factor": FACTORS, "long_factor": LONG_FACTORS, "factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        LongRoPEScaling(FACTORS, LONG_FACTORS, 512, 4.0),
    ),
}  # fmt: skip


def _llama(parameters: dict, theta: float) -> torch.nn.Module:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="compares with transformers")
    config = llama.LlamaConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_theta": theta, **parameters},
    )  # fmt: skip
    return llama.LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("length", [100, 512, 513, 5000])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("rule", RULES)
def test_tables_are_those_of_transformers(rule: str, theta: float, length: int) -> None:
    """In float32 arithmetic to the bit; the module's own, from float64, to float32's error in the angle."""
    parameters, scaling = RULES[rule]
    assert scaling_from_config(parameters, MAX_POSITIONS) == scaling
    theirs = _llama(parameters, theta)
    positions = torch.arange(length)
    cos, sin = (t[0, :, : HEAD_DIM // 2] for t in theirs(torch.zeros(1), positions[None]))
    inv_freq, amplitude = frequencies_of(HEAD_DIM, theta, scaling, length, dtype=torch.float32)
    assert torch.equal(inv_freq, theirs.inv_freq)
    ours = rotary_tables(rotary_angles(positions, inv_freq), amplitude)
    assert torch.equal(ours[0], cos)
    assert torch.equal(ours[1], sin)
    rotary = RotaryEmbedding(HEAD_DIM, base=theta, scaling=scaling)(positions)
    error = length * 6e-8 * 4 + 1e-6  # an angle's float32 rounding grows with it
    torch.testing.assert_close(rotary.cos[0], cos, rtol=0, atol=error)
    torch.testing.assert_close(rotary.sin[0], sin, rtol=0, atol=error)


def test_ntk_is_the_dynamic_rule_at_its_end() -> None:
    """factor s: the fastest pair stays, the slowest is slowed by s exactly."""
    plain, (ntk, amplitude) = rotary_frequencies(64), NTKScaling(4.0).frequencies(64, 10000.0)
    assert amplitude == 1.0
    torch.testing.assert_close(ntk[0], plain[0])
    torch.testing.assert_close(ntk[-1], plain[-1] / 4)
    dynamic, _ = DynamicNTKScaling(4.0, 100).frequencies(64, 10000.0, 175)
    torch.testing.assert_close(dynamic, ntk)  # 4 * 1.75 - 3 = 4


def test_partial_width_as_gpt_neox(backend: str, device: str) -> None:
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox", reason="compares with transformers")
    config = neox.GPTNeoXConfig(
        hidden_size=64, num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )  # fmt: skip
    q, k, v = (torch.randn(2, 4, 13, 16) for _ in range(3))
    cos, sin = neox.GPTNeoXRotaryEmbedding(config)(q, torch.arange(13)[None])
    q2, k2 = neox.apply_rotary_pos_emb(q, k, cos, sin)
    want = torch.nn.functional.scaled_dot_product_attention(q2, k2, v)
    rope = RotaryEmbedding(16, width=4)
    torch.testing.assert_close(fastattn.attention(q, k, v, rotary=rope(13), backend=backend), want)
    for ours, theirs in zip(rope.rotate(q, k, backend=backend), (q2, k2), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_xpos_is_that_of_rotary_embedding_torch(backend: str, device: str) -> None:
    lucid = pytest.importorskip("rotary_embedding_torch", reason="compares with rotary-embedding-torch")
    q, k, v = (torch.randn(2, 3, 40, 16) for _ in range(3))
    q2, k2 = lucid.RotaryEmbedding(16, use_xpos=True).rotate_queries_and_keys(q, k)
    rope = RotaryEmbedding(16, interleaved=True, xpos_base=512.0)
    for ours, theirs in zip(rope.rotate(q, k, backend=backend), (q2, k2), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    want = torch.nn.functional.scaled_dot_product_attention(q2, k2, v, is_causal=True)
    got = fastattn.attention(q, k, v, rotary=rope(40), mask=fastattn.Causal(), backend=backend)
    torch.testing.assert_close(got, want)


def test_xpos_decays_with_the_distance_and_not_with_the_center() -> None:
    rope = RotaryEmbedding(16, xpos_base=512.0)
    for length in (30, 60):
        cos, sin, key_cos, key_sin = rope.tables(30, length=length)
        assert key_cos is not None
        assert key_sin is not None
        zeta = (torch.arange(0, 16, 2) + 0.4 * 16) / (1.4 * 16)
        # |y_q| |y_k| of one pair, seven apart
        product = torch.hypot(cos[20], sin[20]) * torch.hypot(key_cos[13], key_sin[13])
        torch.testing.assert_close(product, zeta ** (7 / 512))


@pytest.mark.parametrize("interleaved", [False, True])
def test_mrope_is_that_of_qwen(interleaved: bool, backend: str, device: str) -> None:
    name = "qwen3_vl.modeling_qwen3_vl" if interleaved else "qwen2_vl.modeling_qwen2_vl"
    qwen = pytest.importorskip(f"transformers.models.{name}", reason="compares with transformers")
    sections = [12, 10, 10] if interleaved else [8, 12, 12]
    config_type = qwen.Qwen3VLTextConfig if interleaved else qwen.Qwen2VLTextConfig
    config = config_type(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, num_key_value_heads=2, head_dim=HEAD_DIM,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, "mrope_interleaved": interleaved,
        },
    )  # fmt: skip
    module = qwen.Qwen3VLTextRotaryEmbedding if interleaved else qwen.Qwen2VLRotaryEmbedding
    positions = torch.randint(0, 500, (3, 2, 19))
    cos, sin = module(config)(torch.zeros(1), positions)
    half = HEAD_DIM // 2
    inv_freq, _ = frequencies_of(HEAD_DIM, 10000.0, None, dtype=torch.float32)
    ours = rotary_tables(rotary_angles(positions, inv_freq, section_pairs(sections, interleaved=interleaved)))
    assert torch.equal(ours[0], cos[..., :half])
    assert torch.equal(ours[1], sin[..., :half])
    q, k, v = torch.randn(2, 4, 19, HEAD_DIM), torch.randn(2, 2, 19, HEAD_DIM), torch.randn(2, 2, 19, 8)
    q2, k2 = qwen.apply_rotary_pos_emb(q, k, cos, sin)
    want = torch.nn.functional.scaled_dot_product_attention(q2, k2, v, is_causal=True, enable_gqa=True)
    rope = RotaryEmbedding(HEAD_DIM, sections=sections, interleaved_sections=interleaved)
    got = fastattn.attention(q, k, v, rotary=rope(positions), mask=fastattn.Causal(), backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    # text: the same position on every axis is the one-dimensional embedding
    same = fastattn.attention(q, k, v, rotary=RotaryEmbedding(HEAD_DIM)(19), backend=backend)
    torch.testing.assert_close(fastattn.attention(q, k, v, rotary=rope(19), backend=backend), same)


def test_axial_is_that_of_dinov3(backend: str, device: str) -> None:
    """Patch centers in [-1, 1] times 2 pi: positions need not be integers."""
    dino = pytest.importorskip(
        "transformers.models.dinov3_vit.modeling_dinov3_vit", reason="compares with transformers"
    )
    config = dino.DINOv3ViTConfig(hidden_size=64, num_attention_heads=4, image_size=80, patch_size=16)
    theirs = dino.DINOv3ViTRopePositionEmbedding(config).eval()
    cos, sin = theirs(torch.zeros(1, 3, 80, 96))
    coords = dino.get_patches_center_coordinates(5, 6, dtype=torch.float64, device="cpu")
    rope = RotaryEmbedding(16, base=config.rope_theta, axial=2)
    rotary = rope(2 * math.pi * coords.t(), length=1)
    torch.testing.assert_close(rotary.cos[0], cos[:, :8], rtol=0, atol=2e-6)
    torch.testing.assert_close(rotary.sin[0], sin[:, :8], rtol=0, atol=2e-6)


def test_axial_of_a_grid_with_a_class_token() -> None:
    """Scores depend on the difference of rows and of columns; the prefix is not rotated."""
    grid = grid_positions(4, 5, prefix=1)
    assert grid[:, 0].tolist() == [0, 0]
    assert grid[:, 1 + 2 * 5 + 3].tolist() == [2, 3]
    q, k = torch.randn(1, 1, 21, 16), torch.randn(1, 1, 21, 16)
    q[:, :, 1:], k[:, :, 1:] = q[:, :, 1:2].clone(), k[:, :, 1:2].clone()  # the same content in every patch
    turned_q, turned_k = RotaryEmbedding(16, axial=2).rotate(q, k, grid)
    assert torch.equal(turned_q[:, :, 0], q[:, :, 0])
    scores = (turned_q @ turned_k.mT)[0, 0, 1:, 1:].view(4, 5, 4, 5)
    torch.testing.assert_close(scores[:3, :4, :3, :4], scores[1:, 1:, 1:, 1:], rtol=0, atol=1e-5)
    assert axial_pairs(16, 2).tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize(("interleaved", "width"), [(False, 6), (True, 6), (True, 4), (False, 10)])
def test_trailing_width(interleaved: bool, width: int, backend: str, device: str) -> None:
    """The last R dimensions, by moving them to the front by hand; inside the kernel, outside it, and learned."""
    q, k, v = torch.randn(2, 4, 9, 10), torch.randn(2, 2, 9, 10), torch.randn(2, 2, 9, 5)
    first = 10 - width
    moved = [torch.cat((x[..., first:], x[..., :first]), -1) for x in (q, k)]
    leading = RotaryEmbedding(10, width=width, interleaved=interleaved)
    want = fastattn.attention(*moved, v, rotary=leading(9), backend="reference")
    back = [torch.cat((x[..., width:], x[..., :width]), -1) for x in leading.rotate(*moved, backend="reference")]
    for learned in (False, True):
        rope = RotaryEmbedding(10, width=width, interleaved=interleaved, trailing=True, learned=learned)
        torch.testing.assert_close(fastattn.attention(q, k, v, rotary=rope(9), backend=backend), want)
        for got, expected in zip(rope.rotate(q, k, backend=backend), back, strict=True):
            torch.testing.assert_close(got, expected)
        with torch.no_grad():
            copies = q.clone(), k.clone()
            rope.rotate(*copies, inplace=True, backend=backend)
            for got, expected in zip(copies, back, strict=True):
                torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_with_a_trailing_width(interleaved: bool, backend: str, device: str) -> None:
    q, k, v = (torch.randn(1, 2, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    rotary = RotaryEmbedding(8, width=4, trailing=True, interleaved=interleaved)(7)
    grads = []
    for name in (backend, "reference"):
        out = fastattn.attention(q, k, v, rotary=rotary, mask=fastattn.Causal(), backend=name)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    turned = [
        torch.cat((x[..., :4], _turn(x[..., 4:], rotary.cos[:, :7], rotary.sin[:, :7], interleaved)), -1)
        for x in (q, k)
    ]
    out = torch.nn.functional.scaled_dot_product_attention(*turned, v, is_causal=True)
    want = torch.autograd.grad(out.square().sum(), (q, k, v))
    for got in grads:
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


# -- identities --------------------------------------------------------------------------------------------------------

LAYOUTS = [
    {}, {"interleaved": True}, {"width": 4}, {"width": 4, "trailing": True}, {"axial": 2}, {"sections": (2, 1, 1)},
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rotating_back_is_the_inverse(layout: dict, backend: str, device: str) -> None:
    rope = RotaryEmbedding(8, **layout)
    q, k = torch.randn(2, 2, 9, 8), torch.randn(2, 1, 9, 8)
    positions = torch.randint(0, 1000, (rope.axes, 2, 9) if rope.axes > 1 else (2, 9))
    again = rope.rotate(*rope.rotate(q, k, positions, backend=backend), -positions, backend=backend)
    torch.testing.assert_close(again[0], q, rtol=0, atol=2e-6)
    torch.testing.assert_close(again[1], k, rtol=0, atol=2e-6)


def test_an_amplitude_comes_back_squared_and_the_gradient_is_the_transpose(backend: str, device: str) -> None:
    rope = RotaryEmbedding(8, scaling=YaRNScaling(8.0, 64))
    amplitude = 0.1 * math.log(8.0) + 1
    q, k = torch.randn(1, 2, 9, 8, requires_grad=True), torch.randn(1, 2, 9, 8)
    positions = torch.arange(9)
    turned, _ = rope.rotate(q, k, positions, backend=backend)
    again, _ = rope.rotate(turned, k, -positions, backend=backend)
    torch.testing.assert_close(again, amplitude**2 * q)
    (grad,) = torch.autograd.grad(turned, q, q)
    torch.testing.assert_close(grad, rope.rotate(q, k, -positions, backend="reference")[0])


@pytest.mark.parametrize("scaling", [None, LinearScaling(2.0), YaRNScaling(4.0, 64)], ids=str)
def test_shift_invariance(scaling: RotaryScaling | None, backend: str, device: str) -> None:
    rope = RotaryEmbedding(8, scaling=scaling)
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    want = fastattn.attention(q, k, v, rotary=rope(6), backend=backend)
    shifted = fastattn.attention(q, k, v, rotary=rope(torch.arange(6) + 70), backend=backend)
    torch.testing.assert_close(shifted, want, rtol=1e-4, atol=1e-5)


def test_offsets_and_positions_per_sequence(backend: str, device: str) -> None:
    """Cached raw keys with offsets; rotated keys with positions; and the same sequence by itself."""
    rope = RotaryEmbedding(8)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    offsets = torch.tensor([6, 2])
    inside = fastattn.attention(
        q, k, v, rotary=rope(9), mask=fastattn.Causal(), query_offset=offsets, backend=backend
    )  # fmt: skip
    turned, _ = rope.rotate(q, k[:, :, :3], query_offset=offsets, backend=backend)
    by_positions, _ = rope.rotate(q, k[:, :, :3], offsets[:, None] + torch.arange(3), backend=backend)
    torch.testing.assert_close(turned, by_positions)
    _, cached = rope.rotate(k[:, :0], k, backend=backend)
    outside = fastattn.attention(
        turned, cached, v, mask=fastattn.Causal(), query_offset=offsets, backend=backend
    )  # fmt: skip
    torch.testing.assert_close(inside, outside)
    # left padding: each sequence with the positions of its own, the padding at 0
    positions = torch.stack((torch.arange(9), (torch.arange(9) - 4).clamp(min=0)))
    seen = fastattn.BoolMask(torch.arange(9) >= torch.tensor([0, 4])[:, None, None, None])
    got = fastattn.attention(q, k, v, rotary=rope(positions), mask=seen, backend=backend)
    alone = fastattn.attention(q[1:], k[1:, :, 4:], v[1:, :, 4:], rotary=rope(5), backend=backend)
    torch.testing.assert_close(got[1:], alone)


# -- precision and state -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to", "autocast", "double"])
@pytest.mark.parametrize("learned", [False, True])
def test_casts_leave_the_tables_alone(cast: str, learned: bool) -> None:
    """At 30000 positions a bfloat16 frequency would be off by whole turns."""
    rope = RotaryEmbedding(8, base=1e6, learned=learned)
    want = rope(30000).cos.detach().clone()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), rope)
    if cast == "to":
        model.to(torch.float16)
    elif cast != "autocast":
        getattr(model, cast)()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        got = rope(30000).cos
    assert got.dtype == (torch.float64 if cast == "double" and learned else torch.float32)
    torch.testing.assert_close(got.float(), want, rtol=0, atol=0)
    if learned:
        assert rope.inv_freq is not None
        assert rope.inv_freq.dtype == (torch.float64 if cast == "double" else torch.float32)


def test_tables_are_right_at_a_million() -> None:
    """float32 angles are off by 0.03 there."""
    position = 2**20 - 3
    rotary = RotaryEmbedding(64)(torch.tensor([position]))
    exact = [math.cos(position * 10000.0 ** (-k / 32)) for k in range(32)]
    torch.testing.assert_close(rotary.cos[0, 0], torch.tensor(exact), rtol=0, atol=1e-7)


def test_learned_frequencies_against_the_naive_formula(backend: str, device: str) -> None:
    """d inv_freq in float64, and in float32 within twice torch's own error."""
    rope = RotaryEmbedding(8, learned=True).double()
    assert rope.inv_freq is not None
    q, k, v = torch.randn(2, 4, 11, 8), torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, 6)
    results = {}
    for dtype in (torch.float64, torch.float32):
        x = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        rope.to(dtype)
        out = fastattn.attention(*x, rotary=rope(11), mask=fastattn.Causal(), backend=backend)
        ours = torch.autograd.grad(out.square().sum(), [*x, rope.inv_freq])
        frequencies = rope.inv_freq.detach().clone().requires_grad_()
        angle = torch.arange(11, dtype=dtype)[:, None] * frequencies
        turned = [_turn(t, angle.cos(), angle.sin(), False) for t in x[:2]]
        naive = torch.nn.functional.scaled_dot_product_attention(*turned, x[2], is_causal=True, enable_gqa=True)
        results[dtype] = ours, torch.autograd.grad(naive.square().sum(), [*x, frequencies])
    for ours, exact in zip(*results[torch.float64], strict=True):
        torch.testing.assert_close(ours, exact)
    _, exact = results[torch.float64]
    for ours, naive, want in zip(*results[torch.float32], exact, strict=True):
        error, allowed = (ours - want).abs().max(), 2 * (naive - want).abs().max()
        assert error <= allowed + 1e-6 * want.abs().max()


def test_learned_gradient_by_its_formula() -> None:
    """d angle = y0 dy1 - y1 dy0, and d inv_freq the sum of position * d angle."""
    rope = RotaryEmbedding(6, learned=True).double()
    q, k = torch.randn(1, 2, 5, 6, dtype=torch.float64), torch.zeros(1, 1, 5, 6, dtype=torch.float64)
    y, _ = rope.rotate(q, k)
    dy = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, rope.inv_freq, dy)
    d_angle = y[..., :3] * dy[..., 3:] - y[..., 3:] * dy[..., :3]
    torch.testing.assert_close(grad, (torch.arange(5.0)[:, None] * d_angle).sum((0, 1, 2)))


def test_explain_says_when_the_rotation_runs_outside() -> None:
    q = torch.randn(1, 2, 5, 8)
    learned = fastattn.explain(q, q, q, rotary=RotaryEmbedding(8, learned=True)(5))
    assert "before it: rotation in plain torch" in str(learned)
    assert fastattn.explain(q, q, q, rotary=RotaryEmbedding(8)(5)).notes == []


def test_tables_are_kept_and_grow() -> None:
    rope = RotaryEmbedding(8)
    first = rope(10)
    assert rope(200) is first
    assert rope(300).cos.shape[1] >= 300
    torch.testing.assert_close(rope(300).cos[:, :10], first.cos[:, :10], rtol=0, atol=0)
    dynamic = RotaryEmbedding(8, scaling=DynamicNTKScaling(2.0, 16))
    assert dynamic(64).cos.shape[1] == 64
    assert not torch.equal(dynamic(64).cos[:, :16], dynamic(16).cos)


def test_no_state_unless_learned_and_copies() -> None:
    assert list(RotaryEmbedding(8).state_dict()) == []
    assert list(RotaryEmbedding(8, learned=True).state_dict()) == ["inv_freq"]
    rope = RotaryEmbedding(8, scaling=Llama3Scaling(), interleaved=True)
    rope(7)
    for again in (copy.deepcopy(rope), pickle.loads(pickle.dumps(rope))):
        assert torch.equal(again(7).cos, rope(7).cos)
        assert repr(again) == repr(rope)
    assert "interleaved=True, scaling=Llama3Scaling(factor=8.0" in repr(rope)


def test_under_compile() -> None:
    rope = RotaryEmbedding(8, width=4, trailing=True)
    q = torch.randn(1, 2, 12, 8)
    compiled = torch.compile(lambda x: fastattn.attention(x, x, x, rotary=rope(x.shape[2])), fullgraph=True)
    torch.testing.assert_close(compiled(q), fastattn.attention(q, q, q, rotary=rope(12)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RotaryEmbedding(7), "width"),
        (lambda: RotaryEmbedding(8, width=10), "width"),
        (lambda: RotaryEmbedding(8, base=-1.0), "base"),
        (lambda: RotaryEmbedding(8, axial=3), "width"),
        (lambda: RotaryEmbedding(8, sections=(2, 1)), "sections"),
        (lambda: RotaryEmbedding(8, sections=(4,)), "sections"),
        (lambda: RotaryEmbedding(8, sections=(0, 2, 2), interleaved_sections=True), "sections"),
        (lambda: RotaryEmbedding(8, sections=(2, 2), axial=2), "sections"),
        (lambda: RotaryEmbedding(8, axial=2, xpos_base=512.0), "xpos_base"),
        (lambda: RotaryEmbedding(8, scaling="yarn"), "scaling"),
        (lambda: RotaryEmbedding(8, scaling=DynamicNTKScaling(2.0, 9), learned=True), "learned"),
        (lambda: RotaryEmbedding(8)(-1), "positions"),
        (lambda: RotaryEmbedding(8)(torch.zeros(1, 2, 3)), "positions"),
        (lambda: RotaryEmbedding(8, axial=2)(torch.zeros(3, 4)), "positions"),
        (lambda: LinearScaling(0.0), "factor"),
        (lambda: YaRNScaling(2.0, 0), "original_length"),
        (lambda: Llama3Scaling(low_frequency_factor=4.0), "low_frequency_factor"),
        (lambda: LongRoPEScaling([1.0], [1.0], 64).frequencies(8, 10000.0), "short_factors"),
        (lambda: NTKScaling(2.0).frequencies(2, 10000.0), "width"),
        (lambda: scaling_from_config({"rope_type": "spiral"}, 9), "rope_type"),
    ],
)
def test_bad_input(make: object, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_interleaved_and_interpolated_as_rotary_embedding_torch(factor: float, backend: str, device: str) -> None:
    lucid = pytest.importorskip("rotary_embedding_torch", reason="compares with rotary-embedding-torch")
    theirs = lucid.RotaryEmbedding(8, interpolate_factor=factor)
    rope = RotaryEmbedding(12, width=8, interleaved=True, scaling=LinearScaling(factor))
    q, k = torch.randn(2, 2, 9, 12), torch.randn(2, 1, 9, 12)
    got = rope.rotate(q, k, query_offset=5, backend=backend)
    for ours, x in zip(got, (q, k), strict=True):
        torch.testing.assert_close(ours, theirs.rotate_queries_or_keys(x, offset=5), rtol=1e-5, atol=1e-5)


def test_shared_frequencies_of_rotary_embedding_torch(backend: str, device: str) -> None:
    """Learned there as here: the gradient of the frequencies."""
    lucid = pytest.importorskip("rotary_embedding_torch", reason="compares with rotary-embedding-torch")
    theirs = lucid.RotaryEmbedding(8, learned_freq=True)
    rope = RotaryEmbedding(8, interleaved=True, learned=True)
    rope.load_state_dict({"inv_freq": theirs.freqs})
    q = torch.randn(1, 2, 9, 8)
    turned, _ = rope.rotate(q, q, backend=backend)
    ours = torch.autograd.grad(turned.square().sum(-1).pow(2).sum() + turned.pow(3).sum(), rope.inv_freq)[0]
    other = theirs.rotate_queries_or_keys(q)
    want = torch.autograd.grad(other.square().sum(-1).pow(2).sum() + other.pow(3).sum(), theirs.freqs)[0]
    torch.testing.assert_close(ours, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", [{}, {"axial": 2}], ids=str)
def test_tables_kept_from_inference_serve_training(layout: dict, backend: str, device: str) -> None:
    rope = RotaryEmbedding(8, **layout)
    q = torch.randn(1, 2, 9, 8)
    with torch.inference_mode():
        fastattn.attention(q, q, q, rotary=rope(9), backend=backend)
        rope.rotate(q, q, backend=backend)
    x = q.clone().requires_grad_()
    fastattn.attention(x, x, x, rotary=rope(9), backend=backend).sum().backward()
    sum(y.square().sum() for y in rope.rotate(x, x, backend=backend)).backward()
    assert x.grad is not None

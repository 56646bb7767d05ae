"""Every form of the Triton search finds the same, and the float64 work stays small. Needs the interpreter or cuda."""

import json

import pytest
import torch
from conftest import BACKENDS

from vqkernels import nearest_code
from vqkernels.ops.nearest_code import nearest_code_op
from vqkernels.testing import DEVICE, brute_force, clusters, strided

if "triton" not in BACKENDS:
    pytest.skip("the search in Triton needs a gpu or TRITON_INTERPRET=1", allow_module_level=True)

from vqkernels.kernels import _tuning
from vqkernels.kernels import nearest_code as kernels
from vqkernels.kernels._common import Configuration
from vqkernels.kernels._forms import Form, alternatives, chunks_of, forced, padded_features_of

# rows, codes, group, packed, warps, stages, parts, described
FORMS = {
    "pairs": Form(128, 64, 2, False, 4, 2),
    "groups of 4": Form(128, 64, 4, False, 4, 2),
    "groups of 8 in parts": Form(64, 128, 8, False, 4, 2, 2),
    "groups of 16": Form(128, 128, 16, False, 4, 2),
    "packed pairs": Form(64, 64, 2, True, 8, 2),
    "packed": Form(128, 64, 4, True, 4, 2),
    "packed in parts": Form(64, 128, 4, True, 4, 2, 2),
    "described": Form(128, 64, 8, False, 4, 2, 1, True),
}
CUDA = DEVICE.type == "cuda"


@pytest.fixture
def settled(monkeypatch):
    """For each search: how many rows were left open, and how many of these were compared with all codes."""
    seen = []
    launch = Configuration.launch

    def spy(self, grid, *args):
        launch(self, grid, *args)
        if self.name.startswith("nearest_code_settle"):
            given = dict(zip(self.kernel.arg_names, args, strict=False))
            count = int(given["counters"])
            hits = given["hits"][: min(count, given["capacity"])]
            listed = int(((hits > 0) & (hits <= self.constants["LENGTH"])).sum())
            seen.append((count, count - listed))

    monkeypatch.setattr(Configuration, "launch", spy)
    return seen


def check(x, codes, **options):
    indices, sq_dist = nearest_code(x, codes, backend="triton", **options)
    expected, least = brute_force(x, codes)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(sq_dist, least.to(sq_dist.dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arch", "dtype"), [(80, torch.float16), (90, torch.float16), (90, torch.float32)], ids=str
)
@pytest.mark.parametrize("name", list(FORMS))
def test_every_form_is_exact(name, dtype, arch, monkeypatch, settled):
    if CUDA and arch == 80 and FORMS[name].described:
        pytest.skip("a descriptor needs Hopper")
    monkeypatch.setattr(kernels, "architecture", lambda tensor: arch)
    # short and odd, a few chunks, and too long to stay on chip; enough codes for several tiles and shares
    for n, k, d in ((70, 300, 7), (130, 150, 112), (20, 140, 300)):
        x, codes = clusters(n, k, d)
        with forced(FORMS[name]):
            check(x.to(dtype), codes.to(dtype))
    assert len(settled) == 3 and all(whole == 0 for _, whole in settled)


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "share"),
    [
        (torch.float16, torch.float16, 0.01),
        (torch.float32, torch.float32, 0.08),
        (torch.float16, torch.float32, 0.08),
    ],
    ids=str,
)
@pytest.mark.parametrize(("k", "d"), [(1024, 64), (500, 30)])
def test_few_rows_are_left_open(k, d, x_dtype, dtype, share, settled):
    """The shares that the bound predicts for normal data: under 1 % for halves, 4 to 8 % where rows are rounded."""
    x, codes = torch.randn(1000, d).to(DEVICE, x_dtype), torch.randn(k, d).to(DEVICE, dtype)
    check(x, codes)
    (count, whole) = settled[0]
    assert count <= share * len(x)
    assert whole == 0
    if dtype == torch.float32:
        assert count > 0


def test_an_offset_costs_nothing_where_the_codes_are_centred(settled):
    x, codes = torch.randn(1000, 32, device=DEVICE), torch.randn(300, 32, device=DEVICE)
    check(x + 1000, codes + 1000)
    count, whole = settled[0]
    assert count <= 0.1 * len(x) and whole == 0


@pytest.mark.parametrize("far", [1e20, 1e33, 3.4e38])
def test_a_row_beside_a_huge_one_is_not_lost(far):
    """Both are scaled alike, so the smaller vanishes, and the squares that would tell so vanish with it."""
    x, codes = torch.randn(60, 16, device=DEVICE), torch.randn(50, 16, device=DEVICE)
    x[7] = far
    check(x, codes)


def test_rounding_of_one_sign(settled):
    """Rows that are nearly constant are rounded alike in every feature: their halves are shorter than they are."""
    codes = torch.where(torch.rand(16, 300) < 0.5, -1e-3, 1e-3).to(DEVICE)
    x = torch.linspace(1, 1.0006, 200)[:, None] + 2e-4 * torch.randn(200, 300)
    check(x.to(DEVICE), codes)


@pytest.mark.parametrize("d", [600, 768])
def test_rows_of_several_blocks(d, settled):
    x, codes = torch.randn(60, d, device=DEVICE), torch.randn(100, d, device=DEVICE)
    check(x, codes)
    count, whole = settled[0]
    assert count < 20 and whole == 0


def test_rows_of_many_equal_codes_are_compared_with_all(settled):
    x, codes = clusters(60, 40, 10)
    codes = codes.repeat(30, 1)
    check(x, codes)
    count, whole = settled[0]
    assert count == whole == 60


def test_fast_search_leaves_no_row_open_and_is_near(settled):
    for dtype in (torch.float16, torch.float32):
        x, codes = torch.randn(500, 48).to(DEVICE, dtype), torch.randn(700, 48).to(DEVICE, dtype)
        expected, least = brute_force(x, codes)
        for form in FORMS.values():
            with forced(form):
                indices, sq_dist = nearest_code(x, codes, exact=False, backend="triton")
            assert (indices == expected).double().mean() > 0.99
            torch.testing.assert_close(sq_dist.double(), least, rtol=2e-3, atol=0)
    assert not settled


def test_fast_search_chooses_no_code_that_is_not_finite():
    codes = torch.full((300, 5), torch.nan, device=DEVICE)
    codes[277] = 3e38
    x = torch.full((4, 5), -3e38, device=DEVICE)
    assert nearest_code(x, codes, exact=False, backend="triton").indices.tolist() == [277] * 4


def test_dithered_points_are_searched_as_codes_are(settled):
    from vqkernels.ops.nearest_code import dithered

    x, codes, dither = torch.randn(800, 24), torch.randn(400, 24), torch.rand(399)
    x, codes, dither = x.to(DEVICE, torch.float16), codes.to(DEVICE), dither.to(DEVICE)
    indices, _ = nearest_code_op(x[None], codes, dither, True, [], backend="triton")
    assert torch.equal(indices[0], brute_force(x, dithered(codes, dither))[0])
    count, whole = settled[0]
    assert count <= 0.1 * len(x) and whole == 0


def test_rows_of_any_stride_need_no_copy(settled):
    x, codes = clusters(120, 37, 20)
    for layout in ("channels", "transposed", "sliced"):
        view = strided(x, layout)
        expected = brute_force(x, codes)[0]
        assert torch.equal(nearest_code(view, codes, backend="triton").indices.flatten(), expected)


def test_chunks_cover_the_features():
    for features in range(1, 257):
        chunks = chunks_of(features)
        assert len(chunks) <= 3 and features <= sum(chunks) == padded_features_of(features)
        assert all(chunk >= 16 and chunk & (chunk - 1) == 0 for chunk in chunks)
        # never more than a power of two would need
        assert sum(chunks) <= max(16, 1 << (features - 1).bit_length())
    assert chunks_of(257) == () and padded_features_of(257) == 320


def test_too_many_rows_are_refused():
    x = torch.zeros(1, 1, 1, device=DEVICE).expand(1, 1 << 31, 1)
    with pytest.raises(Exception, match=r"fewer than 2\^31 rows; got 2147483648\. Split"):
        nearest_code(x[0], torch.zeros(2, 1, device=DEVICE), backend="triton")


def test_tuning_measures_once_and_keeps_the_fastest(tmp_path):
    path, default = tmp_path / "of" / "forms.json", FORMS["pairs"]
    others = alternatives(90, 64, 1024, False)
    asked = []

    def measure(form):
        asked.append(form)
        return 1.0 if form == others[2] else 2.0

    key = _tuning.key_of("a gpu", 90, 64, 1024, False, 100, True)
    assert _tuning.tuned_form(path, key, default, others, measure) == others[2]
    assert asked[0] == default and set(asked) == {default, *others}
    assert _tuning.tuned_form(path, key, default, others, None) == others[2]
    other = _tuning.key_of("a gpu", 90, 64, 1 << 20, False, 100, True)
    assert _tuning.tuned_form(path, other, default, others, lambda form: 1.0) == default
    assert set(json.loads(path.read_text())) == {key, other} and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", ["[1]", "{", '{"a key": {"block_n": 1}}', '{"a key": 3}'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "forms.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"must hold forms of the search; got something else"):
        _tuning.tuned_form(path, "a key", FORMS["pairs"], [], lambda form: 1.0)
    assert path.read_text() == text

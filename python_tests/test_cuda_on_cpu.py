"""The CUDA search run on the CPU: its own sources, every GPU thread a fiber, against the contract.

Only `mma.cuh` and `sm90.cuh`, which are PTX, are replaced by what PTX says they do (cuda_on_cpu/). Threads are
scheduled in an order drawn from a seed; copies land and products read shared memory at once, at random, or as
late as they may. So a wrong layout shows as a wrong index, and a missing barrier as one, as a NaN, or as a
deadlock.
"""

import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "cuda_on_cpu"
NVCC = shutil.which("nvcc", path=sysconfig.get_path("scripts")) or shutil.which("nvcc")

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="the headers of CUDA come with nvcc, which is not on PATH"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is on PATH"),
]


def run(*command, check=True):
    done = subprocess.run(
        [*map(str, command)],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert not check or done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def headers():
    # nvcc may be a wrapper far from its toolkit, but it knows where its headers are
    read = run(NVCC, "-M", ROOT / "csrc/cuda/philox.cu").split()
    return next(Path(word).parent for word in read if word.endswith("/cuda_runtime_api.h"))


@pytest.fixture(scope="module")
def program(tmp_path_factory, headers):
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name in ("mma.cuh", "sm90.cuh"):
        shutil.copy(HERE / name, folder / "csrc/cuda" / name)
    sources = [folder / "csrc/cuda" / f"{name}.cu" for name in ("nearest_code", "search_mma", "search_sm90")]
    flags = ("-std=c++20", "-O2", "-w", "-Wno-psabi", "-ffp-contract=off", "-D__CUDA_ARCH_FEAT_SM90_ALL")
    includes = ("-include", HERE / "cuda_runtime.h", "-I", HERE, "-I", folder / "csrc", "-isystem", headers)

    def compiled(source):
        made = folder / f"{source.name}.o"
        run("c++", *flags, *includes, "-x", "c++", "-c", source, "-o", made)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*sources, HERE / "main.cpp"]))
    run("c++", *objects, "-o", folder / "run")
    return folder / "run"


def check(program, *cases):
    words = [word for case in cases for word in case.split()]
    assert len(words) == 10 * len(cases)
    out = run(program, *words, check=False)
    assert out.count(": wrong 0 ") == len(cases), out
    return out


BOTH = pytest.mark.parametrize("gpu", ["hopper", "portable"])

# rows, codes, features, dtypes, what is special about the values, layout of x
SHAPES = (
    "1 1 1 f32 f32 normal contiguous",
    "3 129 8 bf16 bf16 normal contiguous",
    "130 300 40 bf16 bf16 normal sliced",
    "65 127 100 f32 f32 normal transposed",
    "64 257 33 f16 f32 normal channels",
    "33 129 256 f16 f16 normal contiguous",
    "20 129 336 bf16 bf16 normal contiguous",
    "10 50 1000 f32 f32 normal contiguous",
    "6 40 3000 bf16 bf16 normal contiguous",
    "20 300 24 f64 f64 normal sliced",
    "1100 140 16 bf16 bf16 normal contiguous",
)
VALUES = (
    "77 150 17 bf16 bf16 ties sliced",
    "77 150 20 f32 f32 ties contiguous",
    "50 200 130 f32 f32 dither sliced",
    "50 130 64 bf16 bf16 dither contiguous",
    "60 100 24 f32 f32 bad contiguous",
    "60 100 24 f16 f16 bad channels",
    "30 100 24 bf16 bf16 none contiguous",
    "40 60 16 f32 f32 tiny contiguous",
    "40 60 16 bf16 bf16 tiny contiguous",
    "40 60 16 f16 f16 huge contiguous",
    "40 60 16 f32 f32 offset contiguous",
    "40 60 16 f32 f32 mixed contiguous",
    "40 60 48 bf16 bf16 mixed channels",
    "80 200 40 f32 f32 zero contiguous",
    "40 50 64 f32 f64 ties contiguous",
)


@BOTH
def test_shapes_layouts_and_dtypes(program, gpu):
    check(program, *(f"{gpu} {shape} exact 1" for shape in SHAPES))


@BOTH
def test_values(program, gpu):
    out = check(program, *(f"{gpu} {values} exact 2" for values in VALUES))
    # nothing of this is worth much if the certificate leaves everything to float64
    assert out.count("open 0 left 0") >= 5
    # and something must have gone through the candidates
    assert "open 0 " not in next(line for line in out.splitlines() if " ties " in line)


@BOTH
def test_the_fast_search_is_near(program, gpu):
    check(
        program,
        f"{gpu} 300 700 64 f32 f32 normal contiguous fast 3",
        f"{gpu} 130 700 64 bf16 bf16 ties sliced fast 3",
    )


@BOTH
def test_any_order_of_threads(program, gpu):
    cases = [
        f"{gpu} 70 500 {d} f16 f16 ties contiguous exact {seed}" for seed in range(3) for d in (100, 400)
    ]
    check(program, *cases)


@pytest.mark.slow
@BOTH
def test_any_order_of_threads_at_length(program, gpu):
    shapes = ("100 900 100 f16 f16 ties", "600 2000 16 bf16 bf16 normal", "300 700 330 f32 f32 normal")
    check(program, *(f"{gpu} {shape} contiguous exact {seed}" for seed in range(10, 40) for shape in shapes))


PLANS = """
#include <cstdio>
#include <cstdlib>
#include "cuda/certificate.h"
#include "cuda/plan.h"

using namespace vqk::cuda;

static void require(bool good, const char* what, long a, long b, long c) {
  if (good) return;
  std::printf("%s at %ld %ld %ld\\n", what, a, b, c);
  std::exit(1);
}

static uint64_t state = 88172645463325252ull;
static uint64_t draw() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}

// the fold of both kernels for one row of one thread, against the two least of all it saw
template <int kCount>
static void fold() {
  for (int trial = 0; trial < 20000; ++trial) {
    Top top = no_top();
    int first = INT_MAX, second = INT_MAX;
    uint32_t code = 0;
    const uint32_t range = trial % 3 == 0 ? 8 : trial % 3 == 1 ? 1000 : 1 << 23;
    const int exponent = 127 + exponent_of((int)(draw() % 200) - 100);
    require((exponent & 15) != 15, "an exponent that padding has", exponent, 0, 0);
    for (int tile = 0; tile < 5; ++tile) {
      int scores[kCount], least = INT_MAX;
      for (int j = 0; j < kCount; ++j) {
        // padding is inf
        scores[j] = draw() % 9 == 0 ? 0x7f800000 : exponent << 23 | (int)(draw() % range);
        least = lesser(least, scores[j]);
        if (scores[j] < first) second = first, first = scores[j], code = tile * 128 + j;
        else if (scores[j] < second) second = scores[j];
      }
      const auto get = [&](int j) { return scores[j]; };
      require((least_of(1, 2, 3) == 1) && vqk::cuda::least<kCount, int>(get) == least, "least", trial, tile, 0);
      if (least < top.best)
        improve<kCount>(top, least, (uint32_t)tile * 128, 32, get);
      else
        top.second = lesser(top.second, least);
    }
    require(top.best == first && top.code == code, "best", trial, top.best, first);
    // a second of inf may come back as any value beyond all scores
    require(top.second == second || (second >= 0x7f800000 && top.second >= (exponent + 1) << 23), "second", trial,
            top.second, second);
  }
}

int main() {
  fold<32>();
  fold<16>();
  fold<4>();
  bool seen[kTile] = {};
  for (int code = 0; code < kTile; ++code) {
    const int place = place_of(code), column = place % 8;
    require(!seen[place], "a place taken twice", code, place, 0);
    seen[place] = true;
    // lane q holds columns 8 i + 2 q + b as code 32 q + 2 i + b
    require(code == column / 2 * 32 + place / 8 * 2 + column % 2, "place_of", code, place, 0);
  }
  const Chip chips[] = {{9, 0, 132, 232448}, {8, 0, 108, 166912}, {8, 6, 84, 101376}, {8, 9, 142, 101376}, {10, 0, 148, 232448}};
  for (const Chip& chip : chips)
    for (int64_t n : {1l, 64l, 2048l, 65536l, 1048576l, 4294967295l})
      for (int64_t k : {1l, 128l, 1024l, 16777216l})
        for (int64_t d : {1l, 8l, 16l, 40l, 64l, 96l, 128l, 192l, 256l, 320l, 321l, 512l, 704l, 1024l, 1408l, 2048l, 100000l}) {
          const Plan plan = plan_of(n, k, d, chip);
          require(d > 1024 || plan.rows > 0 || chip.block_shared < 120000, "no tile", n, k, d);
          if (plan.rows == 0) continue;
          require(plan.shared <= chip.block_shared, "shared memory", n, k, d);
          require(plan.blocks * plan.rows >= n, "rows left out", n, k, d);
          require(plan.splits >= 1 && plan.splits <= padded_codes(k) / kTile, "splits", n, k, d);
          require(plan.hopper == (chip.major == 9 && d <= 1408), "hopper", n, k, d);
          if (plan.hopper) require(plan.blocks % 2 == 0 && plan.grid % 2 == 0 && plan.grid > 0, "clusters", n, k, d);
          if (plan.hopper) require(plan.stages >= 3 && plan.stages <= kMostStages, "stages", n, k, d);
          // the shapes that matter fill the GPU
          if (n * k >= 2048l * 16384 && plan.hopper)
            require(plan.grid >= 120, "an idle GPU", n, k, d);
        }
  // a bound that is not finite never certifies
  const Reach reach{1, 0.001, 0};
  require(bound_of(1, 0, 1e-6, 64, reach).holds, "bound", 0, 0, 0);
  require(!bound_of(NAN, 0, 1e-6, 64, reach).holds, "bound of NaN", 0, 0, 0);
  require(!bound_of(INFINITY, 0, 1e-6, 64, reach).holds, "bound of inf", 0, 0, 0);
  require(!bound_of(1, 0, 0, 64, reach).holds, "bound of a row that is not held", 0, 0, 0);
  require(!bound_of(1, 0, 1e-6, 1 << 28, reach).holds, "bound of too many features", 0, 0, 0);
  return 0;
}
"""


def test_plans_places_and_folds(tmp_path):
    (tmp_path / "plans.cpp").write_text(PLANS)
    flags = ("-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror")
    run("c++", *flags, "-I", ROOT / "csrc", tmp_path / "plans.cpp", "-o", tmp_path / "plans")
    run(tmp_path / "plans")

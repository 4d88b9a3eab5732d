"""Random problems, masks, layouts, plans and dtypes, poison in dead places. More: pytest --fuzz 500 <this file>"""

import random

import torch

from cases.conv import LARGEST, LAYOUTS, PLANS, assert_near, assert_same, lay_out, out_size, run
from cases.fuzz import beyond_vendor, draw_case, draw_masks, poisoned
from prunekernels import reference


def draw_problem(seed):
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    case = draw_case(rng)
    dtype = rng.choice([torch.float32] * 3 + [torch.float64, torch.bfloat16, torch.float16])
    dtype = torch.float64 if beyond_vendor(case) else dtype
    plan, integers = rng.choice(PLANS), rng.random() < 0.7
    layouts = rng.choices(LAYOUTS[:3], k=3)

    def draw(*size):
        top = LARGEST[dtype]
        numbers = torch.randint(-top, top + 1, size, generator=gen) if integers else torch.randn(size, generator=gen)
        return numbers.to(dtype)

    masks = draw_masks(rng, gen, case)
    args = masks | {"weight_grad": rng.choice(["masked", "dense"])}
    if rng.random() < 0.3:
        args["grad_scale"] = torch.randint(0, 3, (case.k,), generator=gen).float()
    x, weight = draw(case.n, case.c, case.h, case.w), draw(case.k, case.c // case.groups, case.r, case.s)
    grad_out = draw(*out_size(case))
    x, weight, grad_out = map(lay_out, (x, weight, grad_out), layouts)
    bias = draw(case.k) if rng.random() < 0.7 else None
    told = f"{case} {dtype} plan={plan} layouts={layouts} masks={list(masks)} weight_grad={args['weight_grad']}"
    problem = x, weight, bias, grad_out
    given = poisoned(rng, problem, layouts, case, args) if rng.random() < 0.5 else problem
    return case, problem, given, plan, args, integers, told


def test_fuzz(fuzz_seed):
    case, problem, given, plan, args, integers, told = draw_problem(fuzz_seed)
    try:
        got = run(given, case, plan, **args)
        want = reference.gradients(*problem, **case.conv_args, **args)
        if integers:
            assert_same(got, [None if t is None else t.to(got[0].dtype).double() for t in want])
        else:
            assert_near(got, want)
    except Exception as error:
        repro = f"pytest python_tests/ops/test_fuzz.py --fuzz-seed {fuzz_seed}"
        raise AssertionError(f"repro: {repro}  # {told}\n{type(error).__name__}: {error}") from error

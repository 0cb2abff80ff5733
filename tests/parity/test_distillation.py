"""losses.distillation beside loops in plain Python, and the mirror beside torchvision's VGGs."""
import math

import pytest
import torch
import torchvision

from crossmodal.losses.distillation import best_picture, image_distance, level_distance, level_weights, stage1_loss, stage2_loss
from crossmodal.models.mirror import Mirror, Teacher, plan_of, vgg_layers

SHAPES = [(2, 4, 4), (2, 4, 4), (3, 2, 2), (5, 1, 1)]
VGGS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4), "vgg16_bn": (2, 2, 3, 3, 3)}
PLANS = [((4,),), ((4, 6),), ((4,), (6, 5)), ((3, 5), (7,), (2, 4, 6)), ((2,),) * 5, ((4, 4), (6, 6), (8,) * 4, (10,) * 4, (10,) * 4)]


def random(*shape, seed): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(b, p):
    "Real maps, a student's, a teacher's of b * p pictures, real pictures, drawn ones: float64, the last four want slopes where they are drawn."
    real_levels = [random(b, *shape, seed=k) for k, shape in enumerate(SHAPES)]
    student_levels = [random(b, *shape, seed=10 + k).requires_grad_() for k, shape in enumerate(SHAPES)]
    drawn_levels = [random(b * p, *shape, seed=20 + k).requires_grad_() for k, shape in enumerate(SHAPES)]
    return real_levels, student_levels, drawn_levels, random(b, 3, 4, 4, seed=30), random(b, p, 3, 4, 4, seed=31).requires_grad_()


def loop_distance(a, b):
    "L1 over nested lists, and the sign of every difference over their number."
    a, b = a.flatten().tolist(), b.flatten().tolist()
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a), [((y > x) - (y < x)) / len(a) for x, y in zip(a, b)]


def loop_stage1(real_levels, student_levels, real, drawn, weights):
    "Eqs. 1 and 4 with slopes, one sentence, one layer, one picture at a time."
    (b, p), total = drawn.shape[:2], 0.
    to_levels, to_drawn = [torch.zeros_like(level) for level in student_levels], torch.zeros_like(drawn)
    for i in range(b):
        for real_level, level, slope, weight in zip(real_levels, student_levels, to_levels, weights):
            value, signs = loop_distance(real_level[i], level[i])
            total += weight * value / b
            slope[i] = torch.tensor(signs, dtype=slope.dtype).view_as(slope[i]) * weight / b
        found = [loop_distance(real[i], drawn[i, k]) for k in range(p)]
        best = min(range(p), key=lambda k: found[k][0])
        total += found[best][0] / b
        to_drawn[i, best] = torch.tensor(found[best][1], dtype=drawn.dtype).view(3, 4, 4) / b
    return total, to_levels, to_drawn


def loop_stage2(real_levels, drawn_levels, real, drawn, weights):
    "Eqs. 3 and 5 likewise."
    (b, p), total, chosen = drawn.shape[:2], 0., []
    to_levels, to_drawn = [torch.zeros_like(level) for level in drawn_levels], torch.zeros_like(drawn)
    for i in range(b):
        brackets = [sum(weight * loop_distance(one[i], level[i * p + k])[0] for one, level, weight in zip(real_levels, drawn_levels, weights))
                    + loop_distance(real[i], drawn[i, k])[0] for k in range(p)]
        best = min(range(p), key=lambda k: brackets[k])
        chosen.append(best)
        total += brackets[best] / b
        to_drawn[i, best] = torch.tensor(loop_distance(real[i], drawn[i, best])[1], dtype=drawn.dtype).view(3, 4, 4) / b
        for one, level, slope, weight in zip(real_levels, drawn_levels, to_levels, weights):
            slope[i * p + best] = torch.tensor(loop_distance(one[i], level[i * p + best])[1], dtype=slope.dtype).view_as(one[i]) * weight / b
    return total, to_levels, to_drawn, chosen


@pytest.mark.parametrize("weights", [None, (.5, 2., 0., 7.)])
@pytest.mark.parametrize("b, p", [(1, 1), (4, 1), (1, 3), (5, 3)])
def test_losses_against_loops(b, p, weights):
    real_levels, student_levels, drawn_levels, real, drawn = batch(b, p)
    plain = [tensor.detach() for tensor in drawn_levels]
    for loss, loop, levels in ((stage1_loss, loop_stage1, student_levels), (stage2_loss, loop_stage2, drawn_levels)):
        wanted, to_levels, to_drawn, *chosen = loop(real_levels, [level.detach() for level in levels], real, drawn.detach(), weights or (1,) * 4)
        found = loss(real_levels, levels, real, drawn, weights)
        assert math.isclose(found.item(), wanted, rel_tol=1e-12)
        for a, wanted_slope in zip(torch.autograd.grad(found, (*levels, drawn)), (*to_levels, to_drawn)):
            torch.testing.assert_close(a, wanted_slope, rtol=0, atol=1e-14)
        if chosen: assert best_picture(real_levels, plain, real, drawn, weights).tolist() == chosen[0]


@pytest.mark.parametrize("p", [1, 3])
def test_distances_against_loops(p):
    real_levels, _, drawn_levels, real, drawn = batch(4, p)
    for i in range(4):
        for k in range(p):
            assert math.isclose(image_distance(real, drawn)[i, k].item(), loop_distance(real[i], drawn[i, k])[0], rel_tol=1e-12)
            wanted = sum(loop_distance(a[i], b[i * p + k])[0] for a, b in zip(real_levels, drawn_levels))
            assert math.isclose(level_distance(real_levels, drawn_levels)[i, k].item(), wanted, rel_tol=1e-12)
    for found, level in zip(level_weights(real_levels), real_levels, strict=True):
        values = level.flatten().tolist()
        assert math.isclose(found, len(values) / sum(map(abs, values)), rel_tol=1e-6)


@pytest.mark.parametrize("p", [1, 3])
def test_memory_formats_agree(p):
    "Maps of a convolution in channels-last order, and what slices and expansions leave behind."
    real_levels, student_levels, drawn_levels, real, drawn = batch(4, p)
    turned = lambda levels: [level.contiguous(memory_format=torch.channels_last) for level in levels]
    for loss, levels in ((stage1_loss, student_levels), (stage2_loss, drawn_levels)):
        a = loss(real_levels, levels, real, drawn)
        b = loss(turned(real_levels), turned(levels), turned([real])[0], drawn.transpose(3, 4).contiguous().transpose(3, 4))
        for x, y in zip((a, *torch.autograd.grad(a, (*levels, drawn))), (b, *torch.autograd.grad(b, (*levels, drawn)))):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_under_autocast(dtype, p, normalise):
    "Both stages through real networks: finite, near float32, and all weights of the student learn from Stage II."
    torch.manual_seed(0)
    plan = ((4, 4), (6, 6), (8,) * 4)
    teacher, student = Teacher(vgg_layers(plan)).freeze(), Mirror(plan, 16, 12, 24, p, normalise)
    real, codes = torch.rand(4, 3, 16, 16) * 2 - 1, torch.randn(4, 12)
    found = {}
    for kind in (torch.float32, dtype):
        with torch.autocast("cpu", dtype=kind, enabled=kind != torch.float32):
            with torch.no_grad(): real_levels = teacher(real)
            drawn, levels = student(codes)
            weights = level_weights(real_levels)
            found[kind] = torch.stack([stage1_loss(real_levels, levels, real, drawn, weights),
                                       stage2_loss(real_levels, teacher(drawn.flatten(0, 1)), real, drawn, weights)])
        assert found[kind].dtype == torch.float32 and found[kind].isfinite().all()
        for loss in found[kind]:
            slopes = torch.autograd.grad(loss, student.parameters(), retain_graph=True)
            assert all(slope.isfinite().all() and slope.abs().sum() > 0 for slope in slopes)
    torch.testing.assert_close(found[dtype], found[torch.float32], rtol=.03, atol=0)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("normalise", [False, True])
def test_the_best_alone_teaches_the_same(normalise):
    torch.manual_seed(1)
    plan = ((4, 4), (6,))
    teacher, student = Teacher(vgg_layers(plan, normalise)).freeze(), Mirror(plan, 8, 12, 24, 3)
    real, codes = torch.rand(16, 3, 8, 8) * 2 - 1, torch.randn(16, 12)
    with torch.no_grad(): real_levels = teacher(real)
    drawn = student(codes)[0]
    whole = stage2_loss(real_levels, teacher(drawn.flatten(0, 1)), real, drawn)
    best = best_picture(real_levels, teacher(drawn.flatten(0, 1)), real, drawn)
    assert not best.requires_grad and len(best.unique()) > 1
    chosen = drawn[torch.arange(16), best][:, None]
    cheap = stage2_loss(real_levels, teacher(chosen[:, 0]), real, chosen)
    torch.testing.assert_close(cheap, whole)
    for a, b in zip(*(torch.autograd.grad(loss, student.parameters(), retain_graph=True) for loss in (cheap, whole))): torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", VGGS)
def test_plans_of_torchvision(name):
    with torch.device("meta"):
        features = getattr(torchvision.models, name)(weights=None, init_weights=False).features
        teacher = Teacher(features)
        wanted = tuple((width,) * count for width, count in zip((64, 128, 256, 512, 512), VGGS[name], strict=True))
        assert plan_of(features) == teacher.plan == wanted
        drawn, levels = Mirror(wanted, 64, 8, 16)(torch.zeros(2, 8))
        assert drawn.shape == (2, 1, 3, 64, 64)
        for level, taught in zip(levels, teacher(drawn[:, 0]), strict=True): assert level.shape == taught.shape


@pytest.mark.parametrize("resize", ["nearest", "bilinear"])
@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_shapes_of_the_mirror(plan, p, resize):
    torch.manual_seed(0)
    layers = vgg_layers(plan)
    assert plan_of(layers) == plan
    for times in (1, 3):
        side = times * 2 ** len(plan)
        drawn, levels = Mirror(plan, side, 6, 10, p, resize=resize)(torch.randn(2, 6))
        assert drawn.shape == (2, p, 3, side, side)
        for level, taught in zip(levels, Teacher(layers).freeze()(drawn[:, 0]), strict=True): assert level.shape == taught.shape

"""Losses, rewards and advantages against numbers worked by hand, and what must not change them."""
import math

import pytest
import torch

from discriminator import SIMILARITIES, discriminator_loss
from train import LOSSES, REWARD_WEIGHTS, advantages, k3_kl, policy_loss, total_reward

ALL = torch.ones(1, 4, dtype=torch.bool)
DR_GRPO, GRPO = LOSSES["dr_grpo"], LOSSES["grpo"]


def test_advantage_is_not_divided_by_the_standard_deviation():
    """A dr_grpo that still divides by std. By hand: rewards 2, 1, 0, 1 have mean 1 and std sqrt(1/2)."""
    reward = torch.tensor([[2.0, 1.0, 0.0, 1.0]])
    assert advantages(reward, ALL, DR_GRPO).tolist() == [[1, 0, -1, 0]]
    assert advantages(reward, ALL, GRPO)[0, 0].item() == pytest.approx(1 / (math.sqrt(0.5) + 1e-4))


def test_a_failed_judge_is_left_out_of_the_baseline():
    """A failure that becomes reward 0 would lower the mean: here 1, 1 and a failure must leave the baseline
    at 1."""
    terms = {"similarity": torch.tensor([[1.0, 0.0, 1.0]]), "answer": torch.tensor([[0.0, 1.0, math.nan]])}
    reward, valid = total_reward(terms, REWARD_WEIGHTS)
    assert reward[0, :2].tolist() == [1, 1] and valid.tolist() == [[True, True, False]]
    assert advantages(reward, valid, DR_GRPO).tolist() == [[0, 0, 0]]


def test_a_reward_counts_as_much_as_its_weight():
    """A weight that is not used; a failed judge that takes a response out of its group though nobody counts
    it."""
    terms = {"similarity": torch.tensor([[1.0, 0.0]]), "answer": torch.tensor([[0.0, math.nan]])}
    reward, valid = total_reward(terms, {"similarity": 0.5, "answer": 0.0})
    assert reward.tolist() == [[0.5, 0]] and valid.all()
    assert total_reward(terms, {"similarity": 0.5, "answer": 2.0})[1].tolist() == [[True, False]]


def test_advantages_follow_their_responses_when_the_group_is_permuted():
    """A baseline that depends on the order within the group."""
    reward, order = torch.rand(3, 8), torch.randperm(8)
    valid = torch.rand(3, 8) > 0.2
    torch.testing.assert_close(advantages(reward, valid, GRPO)[:, order],
                               advantages(reward[:, order], valid[:, order], GRPO))


def small_case():
    """One question, K = 2, R = 2; the second response has one token."""
    logp = torch.log(torch.tensor([[[0.5, 0.6], [0.2, 0.9]]]))
    old = torch.log(torch.tensor([[[0.5, 0.4], [0.4, 0.3]]]))
    ref = torch.log(torch.tensor([[[0.25, 0.6], [0.2, 0.1]]]))
    return logp, old, ref, torch.tensor([[1.0, -1.0]]), torch.tensor([[[True, True], [True, False]]])


def test_dr_grpo_loss_against_numbers_worked_by_hand():
    """Clipping on the wrong side, a division by length, a prompt or pad token in the loss, KL of the wrong
    sign.

    Ratios are 1, 1.5 -> 1.2 (A = 1) and 0.5, which A = -1 leaves at min(-0.5, -0.8) = -0.8. k3 is 2/4 - 1 -
    ln(1/2) = -0.5 + ln 2 on the first token, 0 on the others. Eq. 2: (1/2) [1 + 1.2 - 0.1 k3 - 0.8].
    """
    logp, old, ref, A, mask = small_case()
    valid = torch.ones(1, 2, dtype=torch.bool)
    k3 = math.log(2) - 0.5
    loss = policy_loss(logp, old, ref, A, mask, valid, valid, 0.2, 0.1, DR_GRPO)
    assert loss.item() == pytest.approx(-(1 + 1.2 - 0.1 * k3 - 0.8) / 2, rel=1e-5)
    loss = policy_loss(logp, old, ref, A, mask, valid, valid, 0.2, 0.1, GRPO)
    assert loss.item() == pytest.approx(-((1 + 1.2 - 0.1 * k3) / 2 - 0.8) / 2, rel=1e-5)


def test_an_invalid_response_has_no_loss_and_no_share():
    logp, old, ref, A, mask = small_case()
    first = torch.tensor([[True, False]])
    one = policy_loss(logp, old, ref, A, mask, first, first, 0.2, 0.0, DR_GRPO)
    assert one.item() == pytest.approx(-(1 + 1.2), rel=1e-5)


def random_case(B=4, K=6, R=5):
    torch.manual_seed(0)
    logp, old, ref = (-torch.rand(B, K, R) for _ in range(3))
    valid, own = torch.rand(B, K) > 0.1, torch.rand(B, K) > 0.5
    return logp, old, ref, torch.randn(B, K), torch.rand(B, K, R) > 0.3, valid, own


def test_micro_batches_add_up_to_the_whole_batch():
    """Gradient accumulation that changes the result: a mean of means, or a normaliser taken per
    micro-batch."""
    case = random_case()
    case[0].requires_grad_()
    whole, = torch.autograd.grad(policy_loss(*case, 0.2, 0.05, DR_GRPO), case[0])
    parts = sum(policy_loss(*(x[i:i + 1] for x in case), 0.2, 0.05, DR_GRPO) for i in range(4))
    torch.testing.assert_close(torch.autograd.grad(parts, case[0])[0], whole)


def test_padding_and_order_within_the_group_change_nothing():
    """A normaliser that counts pad positions, or a loss that treats students and teachers by their place."""
    case = random_case()
    loss = policy_loss(*case, 0.2, 0.05, DR_GRPO)
    pad = [torch.nn.functional.pad(x, (0, 3)) if x.dim() == 3 else x for x in case]
    order = torch.randperm(6)
    torch.testing.assert_close(policy_loss(*pad, 0.2, 0.05, DR_GRPO), loss)
    torch.testing.assert_close(policy_loss(*(x[:, order] for x in case), 0.2, 0.05, DR_GRPO), loss)


def test_k3_is_never_negative_and_estimates_the_kl():
    """KL estimated as logp - ref alone, which is negative half of the time. Mean over exact samples = the
    true KL."""
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    k3 = k3_kl(p.log(), q.log())
    assert (k3 >= 0).all()
    assert (p * k3).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)


def test_discriminator_loss_labels_the_student_1():
    """Labels the other way round. By hand: logits 2 (student) and -1 (teacher) are both on their right
    side."""
    logits, is_student = torch.tensor([[2.0, -1.0]]), torch.tensor([[True, False]])
    by_hand = -(math.log(1 / (1 + math.exp(-2))) + math.log(1 - 1 / (1 + math.exp(1))))
    assert discriminator_loss(logits, is_student).item() == pytest.approx(by_hand, rel=1e-5)
    assert discriminator_loss(logits, ~is_student) > discriminator_loss(logits, is_student)


def test_similarity_reward_is_for_what_reads_like_a_teacher():
    """The reward's sign; and p = 0.5 exactly, which fools nobody."""
    p = torch.tensor([0.1, 0.5, 0.9])
    assert SIMILARITIES["binary"](p).tolist() == [1, 0, 0]
    assert SIMILARITIES["ternary"](torch.tensor([0.1, 0.45, 0.9])).tolist() == [1, 0.5, 0]
    assert SIMILARITIES["tenths"](p).tolist() == pytest.approx([0.9, 0.5, 0.1])
    assert SIMILARITIES["continuous"](torch.tensor([0.123])).tolist() == pytest.approx([0.877])

"""The balance rule as a table."""
import pytest

import gan

D, G = "discriminator", "generator"


@pytest.mark.parametrize(("discriminator", "turn"), [(0.0, D), (0.79, D), (0.8, G), (1.0, G)])
@pytest.mark.parametrize("generator", [0.0, 1.0])
def test_the_discriminator_trains_until_it_is_right_often_enough(discriminator, generator, turn):
    """Below `enough` it is behind, a minibatch at a time; what the generator reaches does not matter."""
    balance = gan.Balance("accuracy", 0.8)
    assert [balance.choose(discriminator, generator) for _ in range(2)] == [turn, turn] and not balance.decided


@pytest.mark.parametrize("updates", [1, 2])
def test_a_critic_also_trains_after_each_generator_update(updates):
    """So many times, whatever is measured; the caller need not measure."""
    balance = gan.Balance("accuracy", 0.8, updates)
    assert [balance.choose(a, 0.0) for a in (0.7, 0.7, 0.9)] == [D, D, G] and balance.decided
    assert [balance.choose(1.0, 0.0) for _ in range(updates + 1)] == [D] * updates + [G]


@pytest.mark.parametrize(("discriminator", "generator", "turn"), [
    (0.9, 0.1, G), (0.5, 0.99, G), (0.5, 1.0, D), (0.2, 0.4, D), (0.2, 0.39, G), (0.0, 0.0, D), (1.0, 1.0, G)])
def test_by_the_first_rule_the_network_that_is_behind_trains(discriminator, generator, turn):
    """The discriminator where generator / 2 >= discriminator, equality included."""
    assert gan.Balance("half").choose(discriminator, generator) == turn


def test_a_run_of_discriminator_updates_is_five_long():
    """Once behind it trains on this minibatch and the next 4, whatever is measured on those; then it is asked anew."""
    balance = gan.Balance("half")
    assert not balance.decided
    turns = [balance.choose(0.0, 1.0)]
    for _ in range(4):
        assert balance.decided
        turns.append(balance.choose(1.0, 0.0))
    assert turns == [D] * 5 and not balance.decided
    assert [balance.choose(1.0, 0.0), balance.choose(0.0, 1.0)] == [G, D]


@pytest.mark.parametrize("updates", [1, 3])
def test_a_fixed_rule_ignores_accuracies(updates):
    """--balance N: N discriminator updates, then one of the generator, for ever."""
    balance = gan.Balance(updates)
    turns = [balance.choose(i % 2, (i + 1) % 2) for i in range(3 * (updates + 1))]
    assert turns == ([D] * updates + [G]) * 3


@pytest.mark.parametrize("arguments", [("accuracy",), ("accuracy", 0.8, 2), ("half",), (3,)])
@pytest.mark.parametrize("before", range(8))
def test_going_on_from_a_saved_state_changes_nothing(arguments, before):
    """Wherever the state is saved and restored, the decisions are those of an unbroken run."""
    measured = [(0.9, 0.1), (0.1, 0.9), (0.9, 0.1), (0.2, 0.8), (0.9, 0.1), (0.9, 0.1), (0.9, 0.1), (0.1, 0.3),
                (0.9, 0.2)]
    whole, first = gan.Balance(*arguments), gan.Balance(*arguments)
    expected = [whole.choose(*pair) for pair in measured]
    turns = [first.choose(*pair) for pair in measured[:before]]
    second = gan.Balance(*arguments)
    second.discriminator_left = first.discriminator_left
    assert turns + [second.choose(*pair) for pair in measured[before:]] == expected

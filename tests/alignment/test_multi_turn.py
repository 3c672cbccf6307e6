"""Multi-turn preference games against enumeration of all conversations, one-turn games and simulation."""

import itertools

import pytest
import torch

import bayesrm as brm
from bayesrm.alignment import games, multi_turn, rollouts
from bayesrm.errors import ArgumentError, DataError

TAU = 0.2


def words(turns=2, size=3):
    """A conversation without chance: the ends are all sequences of `turns` words."""
    states = sum(size**t for t in range(turns))
    transitions = torch.zeros(states, size, states + size**turns)
    first = 0
    for t in range(turns):
        after = first + size**t
        for place, a in itertools.product(range(size**t), range(size)):
            transitions[first + place, a, after + place * size + a] = 1.0
        first = after
    return multi_turn.TurnTree(transitions)


def with_answers(seed=0):
    """Two turns with a random answer between them, states with fewer speeches, and an early end."""
    generator = torch.Generator().manual_seed(seed)
    transitions = torch.zeros(4, 3, 4 + 7)
    for a in range(2):
        transitions[0, a, 1:4] = torch.softmax(torch.randn(3, generator=generator), 0)
    transitions[0, 2, 4] = 1.0
    transitions[1, 0, 5:] = torch.softmax(torch.randn(6, generator=generator), 0)
    transitions[1, 1, 6] = 1.0
    for s, a in itertools.product((2, 3), range(3)):
        transitions[s, a, 4:] = torch.softmax(2.0 * torch.randn(7, generator=generator), 0)
    return multi_turn.TurnTree(transitions.double() / transitions.double().sum(-1, keepdim=True).clamp_min(1e-9))


def policy_on(tree, seed):
    logits = torch.randn(tree.allowed.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.softmax(logits.masked_fill(~tree.allowed, -torch.inf), 1)


def preferences_on(tree, seed=0, scale=2.0):
    n = tree.num_ends
    s = scale * torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.sigmoid(s - s.T)


def conversations(tree, policy, s=0, probability=1.0, path=()):
    """All conversations from a state: their end, their probability and the (state, speech) they go through."""
    for a, n in itertools.product(range(policy.shape[1]), range(tree.transitions.shape[2])):
        p = probability * float(policy[s, a] * tree.transitions[s, a, n])
        if p > 0.0 and n >= tree.num_states:
            yield n - tree.num_states, p, (*path, (s, a))
        elif p > 0.0:
            yield from conversations(tree, policy, n, p, (*path, (s, a)))


def worth_by_enumeration(tree, policy, opponent, preferences, reference, tau):
    """J(pi, opponent) without the opponent's own cost."""
    theirs = list(conversations(tree, opponent))
    total = 0.0
    for end, p, path in conversations(tree, policy):
        win = sum(q * float(preferences[end, other]) for other, q, _ in theirs)
        cost = sum(float((policy[s, a] / reference[s, a]).log()) for s, a in path)
        total += p * (win - tau * cost)
    return total


def deterministic_policies(tree):
    choices = [torch.nonzero(row)[:, 0].tolist() for row in tree.allowed]
    for picks in itertools.product(*choices):
        yield torch.nn.functional.one_hot(torch.tensor(picks), tree.transitions.shape[1]).double()


def descend(tree, preferences, reference, *, tau, step_size, rounds, start=None):
    policy = reference if start is None else start
    for _ in range(rounds):
        policy = multi_turn.mirror_descent_step(
            tree, policy, preferences, reference=reference, step_size=step_size, regularisation=tau
        )
    return policy


class TestValues:
    @pytest.mark.parametrize("tau", [0.0, 0.3])
    def test_the_value_of_the_start_is_that_of_all_conversations(self, tau):
        tree = with_answers()
        policy, opponent, reference = (policy_on(tree, seed) for seed in range(3))
        preferences = preferences_on(tree)
        values = multi_turn.preference_values(
            tree, policy, opponent, preferences, reference=reference, regularisation=tau
        )
        expected = worth_by_enumeration(tree, policy, opponent, preferences, reference, tau)
        assert abs(float(values.v[0]) - expected) < 1e-12

    def test_a_value_is_that_of_committing_to_the_speech(self):
        tree = with_answers()
        preferences = preferences_on(tree)
        policy, opponent, reference = (policy_on(tree, seed) for seed in range(3))
        values = multi_turn.preference_values(
            tree, policy, opponent, preferences, reference=reference, regularisation=TAU
        )
        for a in range(3):
            forced = policy.clone()
            forced[0] = torch.eye(3)[a]
            worth = worth_by_enumeration(tree, forced, opponent, preferences, reference, TAU)
            assert abs(float(values.q[0, a]) - (worth - TAU * float(reference[0, a].log()))) < 1e-12

    def test_reach_adds_up(self):
        tree = with_answers()
        policy = policy_on(tree, 4)
        states, ends = tree.reach(policy)
        by_end = torch.zeros(7).double()
        for end, p, _ in conversations(tree, policy):
            by_end[end] += p
        torch.testing.assert_close(ends, by_end, rtol=0, atol=1e-14)
        torch.testing.assert_close(states[1:].sum(), policy[0, :2].sum())

    def test_against_itself_a_policy_wins_half_of_the_time(self):
        tree = with_answers()
        policy = policy_on(tree, 5)
        values = multi_turn.preference_values(tree, policy, policy, preferences_on(tree))
        assert abs(float(values.v[0]) - 0.5) < 1e-14


class TestBestResponse:
    def test_without_regularisation_it_is_the_best_of_all_policies(self):
        tree = with_answers()
        preferences = preferences_on(tree)
        policy, reference = policy_on(tree, 1), policy_on(tree, 2)
        best = max(
            float(multi_turn.preference_values(tree, other, policy, preferences).v[0])
            for other in deterministic_policies(tree)
        )
        gap = multi_turn.exploitability(tree, policy, preferences, reference=reference, regularisation=0.0)
        assert abs(gap - (best - 0.5)) < 1e-12

    def test_with_regularisation_it_is_a_stationary_point_that_others_do_not_beat(self):
        tree = with_answers()
        preferences = preferences_on(tree)
        opponent, reference = policy_on(tree, 1), policy_on(tree, 2)
        best, values = multi_turn.best_response(tree, opponent, preferences, reference=reference, regularisation=TAU)
        reached = worth_by_enumeration(tree, best, opponent, preferences, reference, TAU)
        assert abs(float(values.v[0]) - reached) < 1e-12
        logits = torch.where(tree.allowed, best, 1.0).log().requires_grad_()
        other = torch.softmax(logits.masked_fill(~tree.allowed, -torch.inf), 1)
        ends = preferences @ tree.reach(opponent)[1]
        states, finals = tree.reach(other)
        prior = torch.where(tree.allowed, reference, 1.0)
        cost = (other * torch.where(tree.allowed, other / prior, 1.0).log()).sum(1)
        (finals @ ends - TAU * (states * cost).sum()).backward()
        assert float(logits.grad[tree.allowed].abs().max()) < 1e-12
        for seed in range(20):
            policy = policy_on(tree, 100 + seed)
            assert worth_by_enumeration(tree, policy, opponent, preferences, reference, TAU) < reached

    def test_the_best_policy_leaves_out_what_the_reference_does(self):
        tree = words(turns=1)
        reference = torch.tensor([[0.5, 0.5, 0.0]]).double()
        preferences = torch.tensor([[0.5, 0.6, 0.1], [0.4, 0.5, 0.1], [0.9, 0.9, 0.5]])
        for tau in (0.0, 0.01):
            best, _ = multi_turn.best_response(tree, reference, preferences, reference=reference, regularisation=tau)
            assert best[0, 0] > 0.99
            assert best[0, 2] == 0.0


class TestMirrorDescent:
    def test_one_turn_is_the_game_of_one_response(self):
        tree = words(turns=1, size=4)
        preferences, policy, reference = preferences_on(tree), policy_on(tree, 1), policy_on(tree, 2)
        step = multi_turn.mirror_descent_step(
            tree, policy, preferences, reference=reference, step_size=0.7, regularisation=TAU
        )
        expected = games.mirror_descent_step(
            preferences, policy[0], reference[0], step_size=0.7, regularisation=TAU, step="inpo"
        )
        torch.testing.assert_close(step[0], expected, rtol=0, atol=1e-14)
        gap = multi_turn.exploitability(tree, policy, preferences, reference=reference, regularisation=TAU)
        other = games.exploitability(preferences, policy[0], reference[0], regularisation=TAU)
        assert abs(gap - float(other)) < 1e-14

    def test_two_turns_with_a_cyclic_preference_reach_the_nash_policy_of_whole_conversations(self):
        """Ends beat each other around a circle of nine, so that no reward ranks them."""
        tree = words()
        angle = 2 * torch.pi * torch.arange(9).double() / 9
        preferences = torch.sigmoid(3.0 * torch.sin(angle[:, None] - angle))
        reference = policy_on(tree, 3)
        # Without chance a policy is a distribution over conversations: the same game with one turn.
        prior = tree.reach(reference)[1]
        nash = games.nash_policy(preferences, prior, regularisation=TAU)
        gaps = []
        policy = reference
        for _ in range(6):
            gaps.append(multi_turn.exploitability(tree, policy, preferences, reference=reference, regularisation=TAU))
            policy = descend(tree, preferences, reference, tau=TAU, step_size=0.5, rounds=60, start=policy)
        torch.testing.assert_close(tree.reach(policy)[1], nash, rtol=0, atol=1e-9)
        assert gaps[0] > 0.02
        assert all(later < 0.1 * sooner for sooner, later in itertools.pairwise(gaps[:4]))
        # The turns of the Nash policy are its conditional distributions.
        table = nash.reshape(3, 3)
        torch.testing.assert_close(policy[0], table.sum(1), rtol=0, atol=1e-9)
        torch.testing.assert_close(policy[1:], table / table.sum(1, keepdim=True), rtol=0, atol=1e-8)

    def test_with_random_answers_nothing_exploits_where_it_comes_to_rest(self):
        tree = with_answers()
        preferences, reference = preferences_on(tree, scale=4.0), tree.uniform()
        rest = descend(tree, preferences, reference, tau=TAU, step_size=0.8, rounds=200)
        assert multi_turn.exploitability(tree, rest, preferences, reference=reference, regularisation=TAU) < 1e-12
        again = descend(tree, preferences, reference, tau=TAU, step_size=1.2, rounds=150, start=policy_on(tree, 9))
        torch.testing.assert_close(rest, again, rtol=0, atol=1e-7)
        # The reference itself is exploited, so that the number can be other than 0.
        assert multi_turn.exploitability(tree, reference, preferences, reference=reference, regularisation=TAU) > 0.01

    def test_too_long_a_step_goes_round_and_round(self):
        tree = words()
        angle = 2 * torch.pi * torch.arange(9).double() / 9
        preferences = torch.sigmoid(6.0 * torch.sin(angle[:, None] - angle))
        policy = descend(
            tree, preferences, tree.uniform(), tau=0.01, step_size=50.0, rounds=100, start=policy_on(tree, 0)
        )
        gap = multi_turn.exploitability(tree, policy, preferences, reference=tree.uniform(), regularisation=0.01)
        assert gap > 0.1


class TestArguments:
    def test_a_tree_is_checked(self):
        good = words().transitions
        backwards = good.clone()
        backwards[2, 0] = torch.eye(13)[1]
        with pytest.raises(ArgumentError, match="earlier"):
            multi_turn.TurnTree(backwards)
        with pytest.raises(ArgumentError, match="sum to 1"):
            multi_turn.TurnTree(0.5 * good)
        with pytest.raises(ArgumentError, match="no speech"):
            multi_turn.TurnTree(torch.where(torch.arange(4)[:, None, None] == 3, 0.0, good))
        with pytest.raises(ArgumentError, match="an end"):
            multi_turn.TurnTree(torch.zeros(3, 2, 3))

    def test_policies_and_settings_are_checked(self):
        tree = words()
        uniform, preferences = tree.uniform(), torch.full((9, 9), 0.5)
        with pytest.raises(ArgumentError, match="`opponent` must hold"):
            multi_turn.preference_values(tree, uniform, 2 * uniform, preferences)
        with pytest.raises(ArgumentError, match="`policy` has shape"):
            multi_turn._policy(tree, "policy", uniform[:2])
        with pytest.raises(ArgumentError, match="there are 9 ends"):
            multi_turn.preference_values(tree, uniform, uniform, preferences[:3, :3])
        with pytest.raises(ArgumentError, match="`reference` is missing"):
            multi_turn.preference_values(tree, uniform, uniform, preferences, regularisation=0.1)
        with pytest.raises(ArgumentError, match="`regularisation` is -1"):
            multi_turn.best_response(tree, uniform, preferences, reference=uniform, regularisation=-1.0)
        with pytest.raises(ArgumentError, match="must be 1"):
            multi_turn.exploitability(tree, uniform, 0.9 * preferences, reference=uniform, regularisation=0.1)
        with pytest.raises(ArgumentError, match="at most 1"):
            multi_turn.mirror_descent_step(
                tree, uniform, preferences, reference=uniform, step_size=20.0, regularisation=0.1
            )


START = [{"role": "user", "content": "Teach me."}]


def lesson():
    """The policy speaks, one of three answers comes by chance, the policy speaks again, and that is the end."""
    transitions = torch.zeros(4, 3, 4 + 9)
    transitions[0, :, 1:4] = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]])
    for s, a in itertools.product(range(3), range(3)):
        transitions[1 + s, a, 4 + 3 * s + a] = 1.0
    return multi_turn.TurnTree(transitions)


def state_of(messages):
    answers = [m["content"] for m in messages[1:] if m["role"] == "user"]
    return int(answers[-1]) if answers else 0


def speakers(tree, policy, seed):
    """The tree as a language: speeches and answers are the numbers of speeches and states."""
    generator = torch.Generator().manual_seed(seed)

    def respond(asked):
        weights = policy[[state_of(messages) for messages in asked]]
        return [str(a) for a in torch.multinomial(weights, 1, generator=generator)[:, 0].tolist()]

    def environment(messages):
        weights = tree.transitions[state_of(messages), int(messages[-1]["content"])]
        node = int(torch.multinomial(weights, 1, generator=generator))
        return str(node) if node < tree.num_states else None

    return respond, environment


def end_of(rollout):
    return 3 * (state_of(rollout.messages) - 1) + int(rollout.messages[-1]["content"])


class TestRollouts:
    @pytest.mark.parametrize("tau", [0.0, 0.3])
    def test_turn_values_are_unbiased(self, tau):
        tree = lesson()
        policy, reference, preferences = policy_on(tree, 1), policy_on(tree, 2), preferences_on(tree)
        exact = multi_turn.preference_values(
            tree, policy, policy, preferences, reference=reference, regularisation=tau
        ).q
        respond, environment = speakers(tree, policy, seed=0)
        groups = rollouts.rollouts([START] * 1000, respond, environment, num_rollouts=4, max_turns=5)
        errors = torch.zeros(1000, 4, 3, dtype=torch.float64)
        for i, group in enumerate(groups):
            ends = torch.tensor([end_of(talk) for talk in group])
            path = [[(state_of(t.messages[:k]), int(t.messages[k]["content"])) for k in t.replies] for t in group]
            ratios = [[float((policy[step] / reference[step]).log()) for step in steps] for steps in path]
            for row in rollouts.turn_rows(group, preferences[ends][:, ends], log_ratios=ratios, regularisation=tau):
                step = path[row.rollout][row.turn]
                errors[(i, *step)] += row.value - exact[step]
        # Conversations over one start share opponents; starts are independent.
        bound = 4.5 * errors.square().sum(0).sqrt()
        assert (errors.sum(0).abs() <= bound).all()
        # All were seen often enough, and a value that is 0.05 off would be found.
        visits = tree.reach(policy)[0][:, None] * policy * 4000
        assert (bound < 0.05 * visits).sum() >= 6

    def test_conversations_go_on_until_one_side_is_done(self):
        asked = []

        def respond(talks):
            asked.append(len(talks))
            return [f"reply {len(talk)}" for talk in talks]

        def environment(messages):
            return None if messages[0]["content"] == "short" else "go on"

        starts = [[{"role": "user", "content": text}] for text in ("short", "long")]
        short, long = rollouts.rollouts(starts, respond, environment, num_rollouts=2, max_turns=3)
        assert asked == [4, 2, 2]
        assert [talk.ended for talk in (*short, *long)] == [True, True, False, False]
        assert short[0].replies == (1,)
        assert long[0].replies == (1, 3, 5)
        assert [m["role"] for m in long[1].messages] == ["user", "assistant"] * 3
        assert long[0].turns[0] == {"role": "assistant", "content": "reply 1"}
        assert starts == [[{"role": "user", "content": text}] for text in ("short", "long")]

    def test_rows_have_what_was_said_before(self):
        respond, environment = speakers(lesson(), lesson().uniform(), seed=1)
        (group,) = rollouts.rollouts([START], respond, environment, num_rollouts=3, max_turns=2)
        rows = rollouts.turn_rows(group, torch.full((3, 3), 0.5))
        assert [(row.rollout, row.turn) for row in rows] == [(i, t) for i in range(3) for t in range(2)]
        for row in rows:
            talk = group[row.rollout]
            assert row.prompt == talk.messages[: 1 + 2 * row.turn]
            assert row.response == talk.messages[1 + 2 * row.turn]["content"]
            assert row.value == 0.5

    def test_leave_one_out_is_the_mean_over_the_others(self):
        matrix = preferences_on(words(), seed=3)[None].repeat(2, 1, 1)
        found = rollouts.leave_one_out(matrix)
        for i in range(9):
            others = [j for j in range(9) if j != i]
            assert abs(float(found[1, i] - matrix[1, i, others].mean())) < 1e-15

    def test_pairs_are_stored_with_winners_as_likely_as_they_are_preferred(self):
        def talk(*said):
            messages = [*START]
            for k, text in enumerate(said):
                messages.append({"role": "assistant" if k % 2 == 0 else "user", "content": text})
            return rollouts.Rollout(tuple(messages), 1, tuple(range(1, len(messages), 2)), True)

        group = [talk("one"), talk("two", "why?", "so"), talk("one")]
        matrix = torch.tensor([[0.5, 0.8, 0.5], [0.2, 0.5, 0.3], [0.5, 0.7, 0.5]])
        data = rollouts.to_conversations([group] * 400, [matrix] * 400, seed=0)
        # The first and the last say the same.
        assert len(data) == 800
        assert data.conversations(0) == [list(group[0].messages), list(group[1].messages)]
        first_wins = 1.0 - data.outcome.reshape(400, 2).mean(0)
        # The second pair lists (1, 2), the preference of 1 over 2.
        for share, p in zip(first_wins, (0.8, 0.3), strict=True):
            assert abs(share - p) < 4.5 * (p * (1 - p) / 400) ** 0.5
        with pytest.raises(DataError, match="the same"):
            rollouts.to_conversations([group[::2]], [torch.full((2, 2), 0.5)], seed=0)

    def test_a_belief_about_pairs_gives_the_preferences(self):
        class Embedding(brm.rewards.FeatureExtractor):
            def extract(self, prompts, responses, *, progress=False):
                said = [[int(m["content"]) for m in talk if m["role"] == "assistant"] for talk in responses]
                return torch.tensor(said).double().numpy()

        tree = lesson()
        respond, environment = speakers(tree, tree.uniform(), seed=2)
        (group,) = rollouts.rollouts([START], respond, environment, num_rollouts=12, max_turns=2)
        extractor = Embedding("any/model")
        features = extractor.extract([], [talk.turns for talk in group])
        pairs = [[i, j] for i in range(12) for j in range(i) if (features[i] != features[j]).any()]
        data = brm.Comparisons.from_arrays(features, candidates=pairs, outcome=[0] * len(pairs))
        model = brm.RewardModel(brm.rewards.PairwisePreference(extractor, rank=2), brm.likelihoods.BradleyTerry())
        belief = brm.fit(model, data).predict_preferences([START], [[talk.turns for talk in group]])
        rows = rollouts.turn_rows(group, belief.preference_matrix()[0])
        assert len(rows) == 24
        values = rollouts.leave_one_out(belief.preference_matrix()[0])
        assert {row.value for row in rows} == set(values.tolist())
        # Those who win and those who lose in the mean over conversations balance.
        assert abs(float(values.mean()) - 0.5) < 1e-12

    def test_arguments_are_checked(self):
        respond, environment = speakers(lesson(), lesson().uniform(), seed=1)
        with pytest.raises(ArgumentError, match="`max_turns` is 0"):
            rollouts.rollouts([START], respond, environment, num_rollouts=1, max_turns=0)
        with pytest.raises(ArgumentError, match="no messages"):
            rollouts.rollouts([[]], respond, environment, num_rollouts=1, max_turns=1)
        with pytest.raises(ArgumentError, match="1 replies to 2"):
            rollouts.rollouts([START], lambda asked: ["one"], environment, num_rollouts=2, max_turns=1)
        (group,) = rollouts.rollouts([START], respond, environment, num_rollouts=2, max_turns=2)
        half = torch.full((2, 2), 0.5)
        with pytest.raises(ArgumentError, match="compares 3 conversations, there are 2"):
            rollouts.turn_rows(group, torch.full((3, 3), 0.5))
        with pytest.raises(ArgumentError, match="`log_ratios` is missing"):
            rollouts.turn_rows(group, half, regularisation=0.1)
        with pytest.raises(ArgumentError, match="entries"):
            rollouts.turn_rows(group, half, log_ratios=[[0.0], [0.0]], regularisation=0.1)
        with pytest.raises(ArgumentError, match="compares 1 conversation;"):
            rollouts.leave_one_out(half[:1, :1])
        with pytest.raises(ArgumentError, match="there are"):
            rollouts.to_conversations([group], [half, half], seed=0)

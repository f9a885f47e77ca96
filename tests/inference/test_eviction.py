from raymoe.inference.eviction import LeastRecentlyUsed


def anything(key):
    return True


def test_the_layers_own_oldest_goes_once_it_has_its_share():
    policy = LeastRecentlyUsed(num_layers=2, num_slots=4)
    policy.used(0, [0, 1])
    policy.used(1, [0, 1])
    policy.used(0, [0])
    assert policy.victim(0, anything) == (0, 1)
    assert policy.victim(1, anything) == (1, 0)


def test_a_layer_below_its_share_takes_from_the_one_above():
    policy = LeastRecentlyUsed(num_layers=2, num_slots=4)
    policy.used(0, [0, 1, 2])
    policy.used(1, [0])
    assert policy.victim(1, anything) == (0, 0)


def test_a_layer_whose_slots_are_all_in_use_leaves_the_others_alone():
    policy = LeastRecentlyUsed(num_layers=2, num_slots=4)
    policy.used(0, [0, 1])
    policy.used(1, [0, 1])
    assert policy.victim(0, lambda key: key[0] != 0) is None


def test_a_layer_without_slots_takes_the_oldest_of_all():
    policy = LeastRecentlyUsed(num_layers=3, num_slots=2)
    policy.used(1, [5])
    policy.used(0, [7])
    assert policy.victim(2, anything) == (1, 5)


def test_what_was_dropped_is_no_victim():
    policy = LeastRecentlyUsed(num_layers=1, num_slots=2)
    policy.used(0, [0, 1])
    policy.dropped(0, 0)
    policy.used(0, [2])
    assert policy.victim(0, anything) == (0, 1)

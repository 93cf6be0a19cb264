"""What containers were held for, of which a killed one cannot say its end."""

from composer_replication.launch.container import ended_s, held_s


def test_a_killed_attempt_counts_until_the_next_one_or_its_own_latest_end():
    def held(*spans):
        return held_s({"attempts": [list(span) for span in spans]})

    assert held((100.0, 130.0)) == 30.0
    assert held((100.0, 460.0), (150.0, 160.0)) == 50.0 + 10.0
    # The next one began long after that, in a call of its own.
    assert held((100.0, 460.0), (9000.0, 9010.0)) == 360.0 + 10.0
    assert ended_s({"attempts": [[1.0, 9.0], [2.0, 3.0]]}) == 3.0

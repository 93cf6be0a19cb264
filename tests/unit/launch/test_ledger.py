import json
import multiprocessing

import pytest

from composer_replication.errors import BudgetError, RunDirectoryError
from composer_replication.launch.ledger import Ledger


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "sweep" / "ledger.json")


def test_jobs_share_one_cap_and_the_one_that_would_pass_it_is_refused(ledger):
    ledger.reserve("a", 2.0, cap_usd=5.0)
    ledger.reserve("b", 2.0, cap_usd=5.0)
    with pytest.raises(BudgetError) as caught:
        ledger.reserve("c", 1.5, cap_usd=5.0)
    assert str(caught.value) == (
        f"c may cost 1.50 USD, and 1.00 of the cap of 5 USD is left: 4.00 USD is spent or set "
        f"aside in {ledger.path}. Raise --budget, or wait for what is running: the part it does "
        "not use comes back."
    )
    assert ledger.total_usd() == 4.0
    ledger.reserve("c", 1.0, cap_usd=5.0)
    assert ledger.total_usd() == 5.0


def test_what_a_job_did_not_use_comes_back(ledger):
    ledger.reserve("a", 4.0, cap_usd=5.0)
    ledger.settle("a", "call-1", 0.25)
    assert ledger.total_usd() == 0.25
    ledger.reserve("b", 4.75, cap_usd=5.0)


def test_settling_an_attempt_twice_counts_its_dollars_once(ledger):
    ledger.reserve("a", 1.0, cap_usd=None)
    for _ in range(3):
        ledger.settle("a", "call-1", 0.4)
    ledger.settle("a", "call-2", 0.3)
    assert ledger.total_usd() == pytest.approx(0.7, abs=1e-12)
    ledger.settle("a", "call-1", 0.5)  # a later figure, such as the bill's, replaces the estimate
    assert ledger.total_usd() == pytest.approx(0.8, abs=1e-12)


def test_a_job_that_is_launched_again_keeps_what_its_attempts_cost(ledger):
    ledger.reserve("a", 3.0, cap_usd=5.0)
    ledger.settle("a", "call-1", 2.5)
    with pytest.raises(BudgetError):
        ledger.reserve("a", 3.0, cap_usd=5.0)
    ledger.reserve("a", 2.5, cap_usd=5.0)
    assert ledger.total_usd() == 5.0


def test_a_crash_after_a_reservation_leaves_it_standing_and_a_relaunch_replaces_it(ledger):
    ledger.reserve("a", 3.0, cap_usd=5.0)
    after_the_crash = Ledger(ledger.path)
    assert after_the_crash.total_usd() == 3.0
    after_the_crash.reserve("a", 4.0, cap_usd=5.0)
    assert after_the_crash.total_usd() == 4.0


def test_a_refused_reservation_of_a_known_job_keeps_its_old_one(ledger):
    ledger.reserve("a", 3.0, cap_usd=5.0)
    with pytest.raises(BudgetError):
        ledger.reserve("a", 6.0, cap_usd=5.0)
    assert ledger.total_usd() == 3.0


def reserve_many(path, worker, done):
    for number in range(10):
        try:
            Ledger(path).reserve(f"{worker}-{number}", 1.0, cap_usd=12.0)
            done.put(1)
        except BudgetError:
            done.put(0)


def test_processes_that_reserve_at_once_stay_under_the_cap_together(ledger):
    spawn = multiprocessing.get_context("fork")
    done = spawn.Queue()
    workers = [spawn.Process(target=reserve_many, args=(ledger.path, name, done)) for name in "abc"]
    for worker in workers:
        worker.start()
    granted = sum(done.get(timeout=30) for _ in range(30))
    for worker in workers:
        worker.join()
    assert granted == 12
    assert ledger.total_usd() == 12.0


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 0, "jobs": {}}', '{"schema": 1}'])
def test_a_file_that_is_no_ledger_of_this_version_is_refused(ledger, text):
    ledger.path.parent.mkdir()
    ledger.path.write_text(text)
    with pytest.raises(RunDirectoryError, match="is not a ledger that this version reads"):
        ledger.reserve("a", 1.0, cap_usd=5.0)
    assert ledger.path.read_text() == text


def test_the_file_says_what_each_attempt_cost(ledger):
    ledger.reserve("a", 1.0, cap_usd=5.0)
    ledger.settle("a", "fc-1", 0.5)
    assert json.loads(ledger.path.read_text()) == {
        "schema": 1,
        "jobs": {"a": {"reserved_usd": 0.0, "spent_usd": {"fc-1": 0.5}}},
    }

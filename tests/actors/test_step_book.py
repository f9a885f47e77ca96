"""What the controller makes of reports when a rank dies between a step and its report."""

from dataclasses import fields
from types import SimpleNamespace

import numpy as np

from raymoe.actors.step_book import StepBook
from raymoe.training.report import StepReport


def report(step, loss):
    values = {
        field.name: {} if "bytes" in field.name and field.name != "snapshot_sent_bytes" else 0
        for field in fields(StepReport)
    }
    rows = np.ones((1, 4), dtype=np.int64)
    return StepReport(
        **values | {"step": step, "loss": loss, "loads": rows, "computed_rows": np.ones(1, dtype=np.int64)}
    )


def book_of(told):
    job = SimpleNamespace(
        config=SimpleNamespace(snapshots=SimpleNamespace(every=2), experts=SimpleNamespace(cluster="c"))
    )
    return StepBook(job, told.append)


def facts(next_step, size):
    owners = np.array([[0, 0, 1, 1]])
    publication = SimpleNamespace(is_measured=True)
    return [SimpleNamespace(publication=publication, owners=owners, next_step=next_step, links=None)] * size


def test_a_step_that_a_dead_rank_did_not_report_is_told_all_the_same():
    book = book_of([])
    book.begin_epoch(0, facts(0, 3))
    for step in range(3):
        for rank in range(3):
            # the last of rank 2 is lost with it
            if (rank, step) != (2, 2):
                book.report(rank, 0, report(step, 5.0 - step))
    assert [summary.step for summary in book.summaries(0)] == [0, 1]
    # all ranks had taken a snapshot after step 2, so nobody does it again
    book.begin_epoch(1, facts(3, 2))
    assert [(summary.step, summary.loss, summary.workers) for summary in book.summaries(0)][2:] == [(2, 3.0, 3)]
    for rank in range(2):
        book.report(rank, 1, report(3, 2.0))
    assert [(summary.step, summary.workers) for summary in book.summaries(2)] == [(2, 3), (3, 2)]


def test_steps_that_are_done_again_are_told_once():
    first_steps = []
    book = book_of(first_steps)
    book.begin_epoch(0, facts(0, 2))
    for step in range(4):
        for rank in range(2):
            book.report(rank, 0, report(step, 1.0))
    book.begin_epoch(1, facts(2, 1))
    for step in range(2, 6):
        book.report(0, 1, report(step, 1.0))
        # of an epoch that is over
        book.report(1, 0, report(step, 9.0))
    assert [summary.step for summary in book.summaries(0)] == list(range(6))
    assert [summary.workers for summary in book.summaries(0)] == [2, 2, 2, 2, 1, 1]
    assert first_steps == [0, 2]


def test_reports_that_got_lost_on_the_way_are_made_up_for_by_the_others():
    book = book_of([])
    book.begin_epoch(0, facts(0, 2))
    for step in range(6):
        book.report(0, 0, report(step, 1.0))
        if step not in (2, 3):
            book.report(1, 0, report(step, 1.0))
    assert [summary.step for summary in book.summaries(0)] == list(range(6))


def test_a_new_controller_tells_what_it_missed_before_what_it_hears():
    book = book_of([])
    book.begin_epoch(7, facts(10, 2), is_under_way=True)
    # both go on while they are asked
    for rank in range(2):
        book.report(rank, 7, report(15, 1.0))
    book.report(0, 7, report(16, 1.0))
    assert book.summaries(0) == []
    # the second keeps one step more than the first
    book.catch_up(
        {0: [report(step, 1.0) for step in (11, 12, 13, 14)], 1: [report(step, 1.0) for step in range(10, 16)]}
    )
    assert [summary.step for summary in book.summaries(0)] == [11, 12, 13, 14, 15]
    book.report(1, 7, report(16, 1.0))
    assert [summary.step for summary in book.summaries(16)] == [16]


def test_a_new_controller_believes_the_living_of_what_they_did_with_the_dead():
    book = book_of([])
    book.begin_epoch(7, facts(10, 2), is_under_way=True)
    book.catch_up({0: [report(step, 1.0) for step in range(10, 15)]})
    assert ([summary.step for summary in book.summaries(0)], book.next_step) == ([10, 11, 12, 13, 14], 15)
    # back to the snapshot: three steps are repeated
    book.begin_epoch(8, facts(12, 1))
    for step in range(12, 16):
        book.report(0, 8, report(step, 1.0))
    assert [summary.step for summary in book.summaries(13)] == [13, 14, 15]

"""What is said of a comparison before it starts."""

from __future__ import annotations

from hf_transfer.studies.expecting import Expectation, expect
from hf_transfer.studies.grid import Row
from hf_transfer.studies.order import Fixed
from hf_transfer.studies.question import Question
from hf_transfer.studies.running import Runner, finished_of
from hf_transfer.studies.searching import Search, space_rows
from hf_transfer.studies.space import count_of


def announce(order: Fixed | Search, question: Question, runner: Runner) -> Expectation:
    """Say what there is to do, and how long it takes."""
    for line in lines_of(order, question):
        runner.tell(line)
    if len(question.seeds) == 1 and question.against:
        runner.tell("One seed gives no interval, and so no verdict: give several seeds.")
    if not question.expects or not order.left:
        return Expectation()
    timed = _timed(order)
    expected, problems = expect(timed, runner.make, question.seeds[0], runner.shared)
    for name, said in problems.items():
        runner.tell(f"Cannot be prepared: {name}: {said}")
    unknown = [name for name, one in expected.of_rows.items() if one is not None and one.training is None]
    if line := expected.line(order.left):
        without = f"; without the training of {', '.join(unknown)}, whose time is not known" if unknown else ""
        beside = ", without the references" if question.against else ""
        like = f", if trials take what {timed[0].name} does" if isinstance(order, Search) else ""
        runner.tell(
            f"Expected: {line} of loading and training{beside}, from a timed batch of every stage{like}{without}. What "
            "follows training is added, and the rest corrected, once a cell has ended."
        )
    return expected


def lines_of(order: Fixed | Search, question: Question) -> list[str]:
    """What there is to do."""
    seeds = f"seed{'' if len(question.seeds) == 1 else 's'} {', '.join(map(str, question.seeds))}"
    if isinstance(order, Search):
        base = " next to the run as given" if order.first else ""
        earlier = f", {order.begun} of them begun earlier" if order.begun else ""
        more = f"; {', '.join(question.against)} for the best" if question.against else ""
        every = " (all combinations)" if order.trials == count_of(order.space) else ""
        lines = [f"Search: {order.trials} trials{every}{base}, {seeds}{earlier}{more}."]
        return [*lines, *(f"  {name}: {one}" for name, one in order.space.items())]
    rows = {cell.row.name for cell in order.all}
    left = [cell for cell in order.all if finished_of(cell) is None]
    done = f", {len(order.all) - len(left)} of them finished" if len(left) < len(order.all) else ""
    more = f", and as many for each of {', '.join(question.against)}" if question.against else ""
    return [f"{len(order.all)} cells ({len(rows)} row{'' if len(rows) == 1 else 's'}, {seeds}){done}{more}."]


def _timed(order: Fixed | Search) -> list[Row]:
    """The rows that a batch is timed of."""
    if isinstance(order, Search):
        return [*order.first, *space_rows(order.space)][:1]
    return list({cell.row.name: cell.row for cell in order.all if finished_of(cell) is None}.values())

"""The page of ``prefixmemory compare`` in a real browser, against the records it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser

from browser import View, chromium, opened
from compared import failed, final, finals, made_suite, nats, scored, tries
from prefixmemory.compare.records import Record, Run
from prefixmemory.compare.report import write_report
from prefixmemory.compare.runs import rates
from prefixmemory.compare.suite import Loaded
from prefixmemory.compare.summarise import summarise

__all__ = ["chromium"]  # a fixture of the tests below

TASKS = ("north", "south")
METHODS = ("base", "in-context", "lora-attention", "prefixmemory")
#: Hits of ten test rows, by task and method, for each seed.
HITS = {
    "north": {"base": [2], "in-context": [5, 4, 6], "lora-attention": [7, 8, 6], "prefixmemory": [9, 8, 9]},
    "south": {"base": [3], "in-context": [6, 6, 7], "lora-attention": [5, 2, 5], "prefixmemory": [4, 4, 5]},
}
#: Hits of five rows of another task, and of five rows behind text.
OTHER = {"base": 4, "in-context": 3, "lora-attention": 1, "prefixmemory": 2}
BEHIND = {"base": {0: 1, 300: 1, 1200: 1}, "in-context": {0: 3, 300: 2, 1200: 0}}
Records = dict[Run, Record]


def hits(count: int, of: int) -> list[float]:
    return [100.0] * count + [0.0] * (of - count)


def make(loaded: Loaded) -> Records:
    """Every record of a suite that scores everything."""
    records: Records = {}
    for task, method in product(loaded.tasks, loaded.methods):
        own = loaded.methods[method]
        if own.is_trained:
            records |= tries(loaded, task, method, [50, 80, 60])
        behind = {str(n): scored(hits(k, 5)) for n, k in BEHIND.get(method, {0: 4, 300: 4, 1200: 3}).items()}
        more = {"long_input": behind, "transfer": {"xquad_en": scored(hits(OTHER[method], 5))}}
        records |= finals(loaded, task, method, [hits(n, 10) for n in HITS[task][method]], records, **more)
        if method in loaded.suite.every_rate:
            low, _, high = rates(loaded, own)
            for rate, seed in product((low, high), (0, 1, 2)):
                run = Run(task, method, "final", rate, seed, chosen=False)
                records[run] = final(run, hits(HITS[task][method][seed] - (1 if rate == low else 2), 10))
    return records


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Records]:
    """The page of a whole comparison, and its records."""
    folder = tmp_path_factory.mktemp("compared")
    loaded = made_suite(
        folder, tasks=TASKS, methods=METHODS, test_rows=10, every_rate=["lora-attention"], long_input=[300, 1200],
        long_input_rows=5, transfer_rows=5, transfers_to=["xquad_en"],
    )  # fmt: skip
    records = make(loaded)
    return write_report(folder, summarise(loaded, records))[-1], records


@pytest.fixture
def view(chromium: Browser, made: tuple[Path, Records]) -> Iterator[View]:
    with opened(chromium, made[0]) as view:
        yield view
        assert view.faults() == []


def attributes(view: View, selector: str) -> list[dict[str, str]]:
    """The data-attributes of what ``selector`` finds."""
    found: list[dict[str, str]] = view.page.eval_on_selector_all(selector, "all => all.map(one => ({...one.dataset}))")
    return found


def points(view: View, figure: str, *names: str) -> dict[tuple[str, ...], float]:
    """The marks of a figure: the named attributes -> value."""
    found = attributes(view, f"#{figure}-figure .point")
    values = {tuple(one[name] for name in names): float(one["value"]) for one in found}
    assert len(values) == len(found)
    return values


def methods_of_table(view: View, table: str) -> list[str]:
    return [row["method"] for row in attributes(view, f"#{table}-table tbody tr")]


def sort_by(view: View, table: str, head: str) -> list[str]:
    view.page.locator(f"#{table}-table thead button", has_text=head).click()
    return methods_of_table(view, table)


# What the records say, computed from them alone


def points_of_runs(records: Records) -> dict[tuple[str, str], dict[int, np.ndarray]]:
    found: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for run, record in records.items():
        if run.stage == "final" and run.chosen:
            found.setdefault((run.task, run.method), {})[run.seed] = np.array(record.test.points)
    return found


def scores(records: Records) -> dict[tuple[str, str], float]:
    """(task, method) -> mean; the task "" is the average."""
    found = {pair: fmean(points.mean() for points in seeds.values()) for pair, seeds in points_of_runs(records).items()}
    return found | {("", method): fmean(found[task, method] for task in TASKS) for method in METHODS}


def about(expected: dict[Any, float]) -> Any:
    return pytest.approx(expected, abs=1e-6)


def ranked(records: Records, task: str) -> list[str]:
    return sorted(METHODS, key=lambda method: -scores(records)[task, method])


# Opening


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 380])
def test_it_can_be_read(chromium: Browser, made: tuple[Path, Records], width: int, scheme: Any) -> None:
    with opened(chromium, made[0], width=width) as view:
        view.page.emulate_media(color_scheme=scheme)
        assert view.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        sizes = (
            "all => all.filter(one => one.textContent.trim()).map(one => parseFloat(getComputedStyle(one).fontSize))"
        )
        assert min(view.page.eval_on_selector_all("main *, #controls *, p, li", sizes)) >= 12
        scaled = (
            "all => all.filter(one => Math.abs(one.getBoundingClientRect().width - +one.getAttribute('width')) > 1)"
        )
        assert view.page.eval_on_selector_all("main figure .panels svg", f"{scaled}.length") == 0
        light = "element => getComputedStyle(element).backgroundColor.match(/\\d+/g).slice(0, 3).every(c => c > 200)"
        assert view.page.eval_on_selector("body", f"({light})") == (scheme == "light")
        assert view.page.locator("main figure").count() == 5
        assert view.page.locator("main figure figcaption", has_text="3 seeds (0, 1, 2").count() == 5
        assert view.page.locator("main .none").all_inner_texts() == ["No run failed, and none is missing."]
        assert view.faults() == []


def test_a_broken_page_is_noticed(chromium: Browser, made: tuple[Path, Records], tmp_path: Path) -> None:
    """The control of all tests that find no faults."""
    html = made[0].read_text()
    broken = {
        "script.html": html.replace("\nrender();\n", "\nrender(); nowhere.x;\n"),
        "request.html": html.replace("default-src 'none'; ", "").replace(
            "<main>", "<main><script src='more.js'></script>"
        ),
    }
    for name, text in broken.items():
        assert text != html
        (tmp_path / name).write_text(text)
        with opened(chromium, tmp_path / name) as view:
            assert view.faults(), name


# Tables


def test_a_click_on_a_head_sorts_by_it(view: View, made: tuple[Path, Records]) -> None:
    records = made[1]
    assert ranked(records, "north") != ranked(records, "south") != list(METHODS)
    assert methods_of_table(view, "scores") == ranked(records, "")  # so it opens
    for task in TASKS:
        assert sort_by(view, "scores", task) == ranked(records, task)
        assert sort_by(view, "scores", task) == ranked(records, task)[::-1]
    assert sort_by(view, "scores", "method") == sorted(METHODS)
    assert sort_by(view, "scores", "method") == sorted(METHODS)[::-1]
    assert view.page.locator("#scores-table th[aria-sort=descending]").inner_text().startswith("method")
    assert sort_by(view, "cost", "trained parameters")[:2] == ["prefixmemory", "lora-attention"]
    assert methods_of_table(view, "scores") == sorted(METHODS)[::-1]  # each table has its own order


def test_a_click_with_the_keyboard_does_the_same(view: View, made: tuple[Path, Records]) -> None:
    head = view.page.locator("#scores-table thead button", has_text="south")
    head.focus()
    view.page.keyboard.press("Enter")
    assert methods_of_table(view, "scores") == ranked(made[1], "south")
    view.page.keyboard.press("Enter")  # the focus has stayed
    assert methods_of_table(view, "scores") == ranked(made[1], "south")[::-1]


def test_the_table_holds_the_scores_of_the_records(view: View, made: tuple[Path, Records]) -> None:
    rows = view.page.locator("#scores-table tbody tr").all()
    found = {}
    for row in rows:
        method = row.get_attribute("data-method")
        for cell in row.locator("td[data-task]").all():
            found[cell.get_attribute("data-task"), method] = float(cell.get_attribute("data-value") or "nan")
            mean = float(cell.locator("b").inner_text())
            assert mean == pytest.approx(found[cell.get_attribute("data-task"), method], abs=0.051)
    assert found == about(scores(made[1]))
    south = view.page.locator("tr[data-method=lora-attention] td[data-task=south]").first.inner_text()
    assert "worst 20.0 · 3 seeds" in south
    below = view.page.locator("#scores-table tr[data-method=lora-attention] td").last.inner_text()
    assert below == "1 of 6"  # 20 on south, where the base model has 30


def test_differences_are_to_the_chosen_method(view: View, made: tuple[Path, Records]) -> None:
    found = points_of_runs(made[1])
    for reference in ("lora-attention", "base"):
        view.page.get_by_label("Difference to").select_option(reference)
        others = [method for method in METHODS if method != reference]
        assert methods_of_table(view, "differences") == others
        expected = {}
        for method, task in product(others, TASKS):
            a, b = found[task, method], found[task, reference]
            seeds = sorted(a.keys() | b.keys())
            pairs = [(a.get(seed, a[0]), b.get(seed, b[0])) for seed in seeds]  # the base model has seed 0 alone
            expected[method, task] = fmean((x - y).mean() for x, y in pairs)
        shown = {
            (method, cell["task"]): float(cell["value"])
            for method in others
            for cell in attributes(view, f"#differences-table tr[data-method={method}] td[data-task]")
        }
        assert shown == about(expected)
        average = attributes(view, "#differences-table tr[data-method=prefixmemory] td:not([data-task])")[0]
        own = fmean(expected["prefixmemory", task] for task in TASKS)
        assert float(average["value"]) == pytest.approx(own)
    assert "higher" in view.page.locator("#differences-table tr[data-method=prefixmemory]").inner_text()


# Figures


def affine(view: View, selector: str, axis: str, by: str = "value") -> float:
    """How far marks are from a straight line of their values, in pixels at most."""
    script = """(all, [axis, by]) => all.map(one => {
      const box = one.querySelector("path").getBoundingClientRect();
      return [+one.dataset[by], axis === "x" ? box.x + box.width / 2 : box.y + box.height / 2];
    })"""
    found = np.array(view.page.eval_on_selector_all(selector, script, [axis, by]))
    assert len(set(found[:, 0])) > 2 and np.ptp(found[:, 1]) > 20
    fit = np.polyfit(found[:, 0], found[:, 1], 1)
    assert (fit[0] > 0) == (axis == "x")  # more is right, or up
    return float(np.abs(np.polyval(fit, found[:, 0]) - found[:, 1]).max())


def test_scores_are_those_of_the_records(view: View, made: tuple[Path, Records]) -> None:
    assert points(view, "scores", "task", "method") == about(scores(made[1]))
    seeds = {
        (one["task"], one["method"], int(one["seed"])): float(one["value"])
        for one in attributes(view, "#scores-figure .seed")
    }
    runs = {(*pair, seed): p.mean() for pair, found in points_of_runs(made[1]).items() for seed, p in found.items()}
    assert seeds == about(runs)
    for one in attributes(view, "#scores-figure .point"):
        assert float(one["low"]) < float(one["value"]) < float(one["high"])
    for task in ("", *TASKS):
        assert affine(view, f"#scores-figure .point[data-task='{task}']", "x") < 1.5


def test_a_wrong_plot_is_noticed(chromium: Browser, made: tuple[Path, Records], tmp_path: Path) -> None:
    """The control of the test above: a number that is not the records', and a scale that bends."""
    html = made[0].read_text()
    value = f'"mean": {scores(made[1])["north", "prefixmemory"]!r}'
    for name, text in {
        "number.html": html.replace(value, '"mean": 99.0'),
        "scale.html": html.replace("f = log ? Math.log10 : value => value", "f = value => value * value"),
    }.items():
        assert text != html
        (tmp_path / name).write_text(text)
        with opened(chromium, tmp_path / name) as view:
            right = points(view, "scores", "task", "method") == about(scores(made[1]))
            straight = affine(view, "#scores-figure .point[data-task='south']", "x") < 1.5
            assert (right, straight) == ((False, True) if name == "number.html" else (True, False))


def test_the_front_holds_what_nothing_beats(view: View, made: tuple[Path, Records]) -> None:
    own = scores(made[1])
    for task in ("", *TASKS):
        found = attributes(view, f"#transfer-figure .point[data-task='{task}']")
        assert {one["method"]: float(one["value"]) for one in found} == about({m: own[task, m] for m in METHODS})
        assert {one["method"]: float(one["otherValue"]) for one in found} == about(
            {m: 20.0 * OTHER[m] for m in METHODS}
        )
        front = {one["method"] for one in found if one["front"] == "true"}
        assert front == {
            m for m in METHODS
            if not any(own[task, rival] > own[task, m] and OTHER[rival] > OTHER[m] for rival in METHODS)
        }  # fmt: skip
        assert front and front != set(METHODS)
        panel = f"#transfer-figure .point[data-task='{task}']"
        assert affine(view, panel, "x") < 1.5 and affine(view, panel, "y", "otherValue") < 1.5
    assert view.page.locator("#transfer-figure path.front").count() == 3


def test_learning_rates_are_those_of_the_records(view: View, made: tuple[Path, Records]) -> None:
    records = made[1]
    expected: dict[tuple[str, ...], list[float]] = {}
    for run, record in records.items():
        if run.stage == "final" and run.learning_rate is not None:
            key = (run.task, run.method, f"{run.learning_rate:g}")
            expected.setdefault(key, []).append(record.test.score)
    assert points(view, "rates", "task", "method", "rate") == about({key: fmean(v) for key, v in expected.items()})
    assert len(attributes(view, "#rates-figure .seed")) == sum(map(len, expected.values()))
    rings = {(one["task"], one["method"], one["rate"]) for one in attributes(view, "#rates-figure .chosen")}
    assert rings == {
        (r.task, r.method, f"{r.learning_rate:g}")
        for r in records
        if r.learning_rate and r.stage == "final" and r.chosen
    }
    assert len(rings) == 4
    view.page.get_by_label("Rows").select_option("validation")
    expected = {
        (run.task, run.method, f"{run.learning_rate:g}"): record.validation.score
        for run, record in records.items()
        if run.stage == "rate"
    }
    assert points(view, "rates", "task", "method", "rate") == about(expected)
    before = view.page.locator("#rates-figure .point").first.bounding_box()
    view.page.get_by_label("Axis").select_option("factor")
    assert points(view, "rates", "task", "method", "rate") == about(expected)
    assert view.page.locator("#rates-figure .point").first.bounding_box() != before
    assert view.page.locator("#robustness-table tbody tr").inner_text().split("\t")[1:] == [
        "45.0", "55.0", "35.0", "−20.0", "3 of 18",
    ]  # fmt: skip


def test_input_lengths_are_those_of_the_records(view: View, made: tuple[Path, Records]) -> None:
    expected = {
        (run.task, run.method, length): one.score
        for run, record in made[1].items()
        for length, one in record.long_input.items()
    }
    expected |= {("", method, length): expected["north", method, length] for _, method, length in list(expected)}
    assert points(view, "lengths", "task", "method", "length") == about(expected)
    assert affine(view, "#lengths-figure .point[data-task=north][data-method=in-context]", "y") < 1.5
    row = view.page.locator("#lengths-table tr[data-method=in-context]").inner_text()
    assert "−60.0 [" in row  # from three rows of five to none


def test_cost_is_that_of_the_records(view: View, made: tuple[Path, Records]) -> None:
    own = scores(made[1])
    assert points(view, "cost", "method") == about({(method,): own["", method] for method in METHODS})
    sizes = {one["method"]: int(one["parameters"]) for one in attributes(view, "#cost-figure .point")}
    assert sizes == {"base": 0, "in-context": 0, "lora-attention": 460_800, "prefixmemory": 1_105_920}
    right = [view.page.locator(f"#cost-figure .point[data-method={m}]").bounding_box()["x"] for m in METHODS]  # type: ignore[index]
    assert right[0] < right[2] < right[3]
    assert "460,800\t1.8 MB\t12.0\t5.00\t0.50\t–\t6" in view.page.locator("#cost-table").inner_text()


# Filters


def shown(view: View) -> tuple[set[str], set[str]]:
    """Methods and tasks of all tables and all figures but the one of what is missing."""
    found = attributes(view, "main .point, main .seed, main .chosen, main tbody tr, main td")
    return {one["method"] for one in found if "method" in one}, {one["task"] for one in found if one.get("task")}


def test_filters_hold_for_tables_and_figures(view: View) -> None:
    everything = set(METHODS), set(TASKS)
    assert shown(view) == everything
    count = len(attributes(view, "main .point"))

    view.page.get_by_label("Filter methods").fill("LoRA")
    assert shown(view) == ({"lora-attention"}, set(TASKS))
    assert methods_of_table(view, "scores") == ["lora-attention"]
    assert 0 < len(attributes(view, "main .point")) < count
    view.page.get_by_label("Filter methods").fill("")
    assert len(attributes(view, "main .point")) == count

    view.page.get_by_label("prefixmemory", exact=True).uncheck()
    assert shown(view) == (set(METHODS) - {"prefixmemory"}, set(TASKS))
    view.page.get_by_label("north", exact=True).uncheck()
    assert shown(view) == (set(METHODS) - {"prefixmemory"}, {"south"})
    heads = " ".join(view.page.locator("#scores-table thead th").all_inner_texts())
    assert "south" in heads and "north" not in heads and "average of 2 tasks" in heads
    assert "whichever are ticked" in view.page.locator("#scores-figure figcaption").inner_text()

    view.page.get_by_label("north", exact=True).check()
    view.page.get_by_label("prefixmemory", exact=True).check()
    assert shown(view) == everything and len(attributes(view, "main .point")) == count


def test_without_anything_ticked_the_page_says_so(view: View) -> None:
    view.page.get_by_label("Filter methods").fill("no such method")
    assert shown(view) == (set(), set())
    assert view.page.locator("main section .none").count() >= 6
    view.page.get_by_label("Filter methods").fill("")
    for task in TASKS:
        view.page.get_by_label(task, exact=True).uncheck()
    assert "Nothing is ticked." in view.page.locator("#scores").inner_text()


# Comparisons that are not whole


def said(view: View, section: str) -> str:
    assert view.faults() == []
    return view.page.locator(f"#{section}").inner_text()


def test_sections_without_figures_say_why(chromium: Browser, tmp_path: Path) -> None:
    loaded = made_suite(tmp_path, tasks=["north"], methods=["lora-attention"], rate_factors=[1.0])
    records = {
        run: final(run, [100.0, 0.0])
        for run in (Run("north", "lora-attention", "final", 0.003, seed) for seed in (0, 1, 2))
    }
    with opened(chromium, write_report(tmp_path, summarise(loaded, records))[-1]) as view:
        assert "No two methods have a task and seed in common yet." in said(view, "differences")
        assert "Not measured: no task of this suite names another one" in said(view, "transfer")
        assert "Not measured: this suite has no long_input." in said(view, "lengths")
        assert "–" in view.page.locator("#scores-table td").last.inner_text()  # below a base model that is not there
        assert view.page.locator(".base").count() == 0
        assert points(view, "scores", "task") == {("north",): 50.0}  # one task has no average beside it


def test_a_comparison_with_rates_alone(chromium: Browser, tmp_path: Path) -> None:
    loaded = made_suite(tmp_path, methods=["lora-attention"])
    with opened(
        chromium, write_report(tmp_path, summarise(loaded, tries(loaded, "north", "lora-attention", [50, 80, 60])))[-1]
    ) as view:
        for section in ("scores", "transfer", "lengths", "cost"):
            assert "No run has been scored yet." in said(view, section)
        assert points(view, "rates", "rate") == {("0.001",): 50, ("0.003",): 80, ("0.009",): 60}
        assert "9 of 12 runs are missing" in said(view, "gaps-note")
        rows = [row.inner_text().split("\t") for row in view.page.locator("#missing-table tbody tr").all()]
        assert rows == [
            ["north", "lora-attention", "3", "not run yet"],
            ["south", "lora-attention", "6", "not run yet"],
        ]


def test_nats_have_three_digits_behind_the_point(chromium: Browser, tmp_path: Path) -> None:
    loaded = made_suite(tmp_path, scoring="loss", methods=["lora-attention", "prefixmemory"], long_input=[300])
    with opened(chromium, write_report(tmp_path, summarise(loaded, nats(loaded)))[-1]) as view:
        assert view.faults() == []
        for table, figure in (("scores", "−0.124"), ("lengths", "−0.129"), ("lengths", "−0.006")):
            assert figure in view.page.locator(f"#{table}-table").inner_text()


def test_a_comparison_without_a_trained_method(chromium: Browser, tmp_path: Path) -> None:
    loaded = made_suite(tmp_path, methods=["base"])
    records = finals(loaded, "north", "base", [[100.0, 0.0]], {}) | finals(loaded, "south", "base", [[0.0, 0.0]], {})
    with opened(chromium, write_report(tmp_path, summarise(loaded, records))[-1]) as view:
        assert "Not measured: no method of this suite is trained." in said(view, "rates")
        assert points(view, "cost", "method") == {("base",): 25.0}


def test_failed_runs_are_told_and_not_drawn(chromium: Browser, tmp_path: Path) -> None:
    message = "</script><b>out of memory</b>"
    loaded = made_suite(tmp_path, methods=["base", "lora-attention"], description="a < b & <i>c</i>")
    records: Records = {}
    for task in loaded.tasks:
        records |= tries(loaded, task, "lora-attention", [50, 80, 60])
        records |= finals(loaded, task, "base", [[100.0, 0.0]], records)
        records |= finals(loaded, task, "lora-attention", [[100.0, 0.0]] * 3, records)
    broken = Run("north", "lora-attention", "final", 0.003, 1)
    records[broken] = failed(broken, message)
    with opened(chromium, write_report(tmp_path, summarise(loaded, records))[-1]) as view:
        assert (
            "1 run failed" in said(view, "gaps-note")
            and "missing" not in view.page.locator("#gaps-note").inner_text().split("Which")[0]
        )
        assert message in said(view, "failed-table")
        assert view.page.locator("#description").inner_text() == "a < b & <i>c</i>"
        row = view.page.locator("#scores-table tr[data-method=lora-attention]")
        assert "5 of 6 runs" in row.inner_text() and "2 of 3 seeds" in row.inner_text()
        assert {one["seed"] for one in attributes(view, "#scores-figure .seed[data-task=north]")} == {"0", "2"}
        assert ("", "lora-attention") not in points(view, "scores", "task", "method")
        assert methods_of_table(view, "scores") == ["base", "lora-attention"]  # what has no average stands last,
        assert sort_by(view, "scores", "average") == ["base", "lora-attention"]  # whichever way one sorts
        assert "Runs that failed, not drawn: lora-attention on north at 0.003 (1)" in said(view, "rates")

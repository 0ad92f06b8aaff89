import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from tests.study.fake_runs import write_run
from trivium.config import UserError, from_dict
from trivium.report.html import Section, render_page
from trivium.report.run import write_report
from trivium.report.study import figure_for_readme, read_results, study_figures, write_study_page
from trivium.report.tables import Table, learning_table
from trivium.report.words import describe_study
from trivium.study.recipe import Recipe
from trivium.study.results import SCHEMA, Entry, collect, interval
from trivium.study.variants import expand
from trivium.train.config import RunConfig

SPEEDS = {"attention": 1.0, "local": 0.97, "simplicial": 1.5}


class Page(HTMLParser):
    """Gathers what a page would fetch, its section titles, its links within itself and its words."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.ids, self.links, self.words, self.styles, self.tags = [], [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "data", "action", "poster") or (name == "href" and tag != "a"):
                self.fetched.append(value)
            if name == "href" and tag == "a":
                self.links.append(value)
            if name == "id":
                self.ids.append(value)
            if name == "style":
                self.styles.append(value)

    def handle_data(self, data):
        (self.styles if self.tags and self.tags[-1] == "style" else self.words).append(data)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished study's folder with its results."""
    folder = tmp_path_factory.mktemp("study")
    recipe = from_dict(
        Recipe,
        {
            "name": "which",
            "task": {"kind": "addition", "max_digits": 2},
            "model": {"width": 16, "heads": 2},
            "compare": {
                "seeds": [0, 1, 2],
                "variants": {
                    "attention": {},
                    "local": {"model.layers": "attention*1 + attention(window=2)*1"},
                    "simplicial": {"model.layers": "attention*1 + simplicial(window1=3, window2=2)*1"},
                },
            },
        },
    )
    entries = [Entry(variant, 3e-3) for variant in expand(recipe)]
    for entry in entries:
        for seed in (0, 1, 2):
            run = entry.variant.run(seed)
            entry.folders[seed] = folder / entry.variant.folder_name(run)
            write_run(entry.folders[seed], run, speed=SPEEDS[entry.variant.name] + 0.02 * seed)
    from trivium.config import to_dict

    results = {
        "schema": SCHEMA,
        "status": "finished",
        "study": folder.name,
        "command": "trivium compare recipes/which.yaml --train.steps 600",
        "recipe": to_dict(recipe),
        "environment": json.loads((entries[0].folders[0] / "environment.json").read_text()),
        "jobs": 2,
        "threads": 1,
        **collect(recipe, entries, length=9),
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def changed(study, **changes):
    return {**read_results(study / "results.json"), **changes}


def check_offline(text):
    page = Page(text)
    assert page.fetched
    assert all(address.startswith("data:") for address in page.fetched)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert "script" not in page.tags
    for style in page.styles:
        assert not re.search(r"url\s*\(|@import|https?:", style)
    return page


def test_a_study_page_opens_offline_and_has_every_section(study):
    path = write_report(study)
    assert path == study / "report.html"
    page = check_offline(path.read_text())
    assert page.ids == [
        "what-the-numbers-show",
        "learning-curves",
        "tokens-to-a-threshold",
        "final-exact-match",
        "what-each-variant-costs",
        "what-is-equal-and-what-is-not",
        "scores-by-slice",
        "right-and-wrong-answers",
        "environment",
        "reproduce",
    ]
    words = " ".join(page.words)
    for wanted in (
        "trivium compare recipes/which.yaml --train.steps 600",
        "tokens to 90 %",
        "tokens to 99 %",
        "FLOPs/token",
        "state bytes/token",
        "tokens/s",
        "bfloat16",
        "AdamW",
        "99+12=",
        "the answer is 120, not 121",
        "layers: attention*1 + simplicial(window1=3, window2=2)*1",
    ):
        assert wanted in words
    assert page.tags.count("img") == 5


def test_a_page_is_drawn_again_from_results_alone(study, tmp_path):
    (tmp_path / "results.json").write_text((study / "results.json").read_text())
    path = write_report(tmp_path / "results.json")
    assert path == tmp_path / "report.html"
    assert path.read_text() == write_report(study).read_text()


def test_a_run_page_opens_offline_and_has_its_numbers(study):
    folder = next(study.glob("simplicial-s1-*"))
    path = write_report(folder)
    page = check_offline(path.read_text())
    assert page.ids == [
        "the-numbers",
        "learning-curves",
        "scores-by-slice",
        "right-and-wrong-answers",
        "environment",
        "reproduce",
    ]
    assert "exact match on 1,000 test problems" in page.words
    assert page.tags.count("img") == 2


def test_a_run_that_goes_on_has_a_page_of_where_it_stands(tmp_path):
    write_run(tmp_path, from_dict(RunConfig, {"task": {"kind": "addition"}}), steps=100)
    (tmp_path / "result.json").unlink()
    page = check_offline(write_report(tmp_path).read_text())
    assert page.ids == ["where-it-stands", "learning-curves", "environment", "reproduce"]
    assert any("not finished, 100 steps so far" in word for word in page.words)


def test_what_a_model_writes_is_shown_and_never_becomes_markup(study):
    text = write_report(study).read_text()
    assert "<b>1</b>" not in text
    assert "&lt;b&gt;1&lt;/b&gt;21" in text


def test_a_section_without_content_still_renders():
    text = render_page(title="a & b", subtitle="", sections=[Section("One", tables=[Table("One", ["x"], [])])])
    assert "<h2>One</h2>" in text
    assert "<title>a &amp; b</title>" in text


def test_the_words_say_who_needed_fewer_tokens_and_what_seeds_cannot_tell(study):
    words = " ".join(describe_study(read_results(study / "results.json")))
    assert "3 variants, 3 finished seeds each, matched within 1 % in parameters to attention" in words
    assert re.search(r"simplicial 0\.6\d times as many \(0\.6\d to 0\.\d\d\)", words)
    assert "simplicial needed fewer tokens than attention by more than the interval" in words
    assert "3 seeds make wide intervals" in words
    assert "No variant was tuned: all used the learning rate 0.003" in words


def test_the_words_do_not_tell_apart_what_the_interval_does_not(study):
    results = changed(study)
    ratio = {"mean": 0.9, "low": 0.7, "high": 1.2, "values": [0.9], "all": True}
    results["variants"]["simplicial"]["token_ratio"] = {"0.9": ratio, "0.99": ratio}
    words = " ".join(describe_study(results))
    assert "The intervals of simplicial and local include 1: these seeds do not tell them from attention" in words
    assert "simplicial needed fewer" not in words


def test_the_words_leave_out_a_comparison_that_not_every_seed_allows(study):
    results = changed(study)
    for variant in results["variants"].values():
        for key in variant.get("token_ratio", {}):
            variant["token_ratio"][key]["all"] = False
    assert "No variant can be compared with attention in tokens" in " ".join(describe_study(results))


def test_failed_and_interrupted_runs_are_told(study):
    failed = [{"run": "local-s1-abc", "variant": "local", "seed": 1, "error": "it broke"}]
    words = " ".join(describe_study(changed(study, failed=failed, status="interrupted")))
    assert "The run local-s1-abc failed and is left out: it broke." in words
    assert "was interrupted" in words


def test_a_study_of_which_nothing_has_finished_has_a_page(study, tmp_path):
    results = changed(study, status="interrupted")
    for variant in results["variants"].values():
        nothing = {"mean": None, "low": None, "high": None, "values": []}
        variant.update(seeds={}, exact_match=nothing, by_tag={}, tokens_per_second=None, precision=None, threads=None)
        variant["samples"] = {"right": [], "wrong": []}
        variant["tokens_to"] = {key: {**nothing, "reached": 0, "seeds": 0} for key in variant["tokens_to"]}
        if "difference" in variant:
            variant["difference"] = nothing
    page = check_offline(write_study_page(results, tmp_path / "report.html").read_text())
    assert any("No run has finished" in word for word in page.words)


def without(variant, seeds=()):
    """Take the seeds that are not in `seeds` out of a variant of results.json, as if their runs had failed."""
    for seed, run in variant["seeds"].items():
        if seed not in seeds:
            run["status"] = "failed"
    left = [run["exact_match"]["rate"] for run in variant["seeds"].values() if run["status"] == "finished"]
    variant["exact_match"] = interval(left)
    nothing = interval([])
    for key, ratio in variant.get("token_ratio", {}).items():
        variant["token_ratio"][key] = {**nothing, "values": ratio["values"][: len(left)], "all": False}
    if "difference" in variant:
        variant["difference"] = interval(variant["difference"]["values"][: len(left)])
    for key, tokens in variant["tokens_to"].items():
        found = interval(tokens["values"][: len(left)])
        variant["tokens_to"][key] = {**found, "reached": len(left), "seeds": 3}


def test_the_words_do_not_call_one_variant_that_finished_as_good_as_all(study):
    results = changed(study)
    for name in ("local", "simplicial"):
        without(results["variants"][name])
    words = " ".join(describe_study(results))
    assert "No run but those of attention has finished, so there is nothing to compare it with." in words
    assert "equally often" not in words


def test_the_words_say_when_the_baseline_has_no_run_to_compare_with(study, tmp_path):
    results = changed(study)
    without(results["variants"]["attention"])
    for name in ("local", "simplicial"):
        variant = results["variants"][name]
        variant["difference"] = interval([])
        for ratio in variant["token_ratio"].values():
            ratio.update(interval([]), all=False)
    words = " ".join(describe_study(results))
    assert "No run of attention has finished, so there is nothing to compare the others with." in words
    page = check_offline(write_study_page(results, tmp_path / "report.html").read_text())
    pictures = re.findall(r'alt="([^"]*)"', (tmp_path / "report.html").read_text())
    assert pictures[0].startswith("attention: – exact match at the end, 90 % not reached, 99 % not reached; local: ")
    assert page.tags.count("img") == 5


def test_one_seed_is_told_as_such_and_given_no_interval(study):
    results = changed(study)
    for variant in results["variants"].values():
        without(variant, seeds=["0"])
        variant["seeds"] = {"0": variant["seeds"]["0"]}
        for tokens in variant["tokens_to"].values():
            tokens["seeds"] = 1
        for ratio in variant.get("token_ratio", {}).values():
            ratio.update(mean=ratio["values"][0], all=True)
    words = " ".join(describe_study(results))
    assert "1 finished seed each" in words
    assert "One seed cannot say how much of that is chance." in words
    assert "One seed gives no interval" in words
    assert "interval includes" not in words
    assert "excludes zero" not in words
    assert "(one seed)" in learning_table(results).rows[1][1]


def test_a_mean_over_fewer_seeds_than_were_begun_says_over_how_many(study):
    results = changed(study)
    assert "(2/3)" not in learning_table(results).note
    without(results["variants"]["local"], seeds=["0", "2"])
    table = learning_table(results)
    assert [row[1].endswith(" (2/3)") for row in table.rows] == [False, True, False]
    assert table.rows[1][3].endswith(" (2/3)")
    assert "only 2 of 3 seeds finished, or reached it" in table.note


def test_what_a_study_noted_of_its_controls_stands_in_the_words(study):
    note = "attention_flops is attention but for the width of its feed-forward."
    assert note in describe_study(changed(study, notes=[note]))


def test_a_table_marks_thresholds_that_only_some_seeds_reached(study):
    results = changed(study)
    results["variants"]["local"]["tokens_to"]["0.99"]["reached"] = 2
    results["variants"]["simplicial"]["tokens_to"]["0.99"] = {"mean": None, "reached": 0, "seeds": 3}
    rows = {row[0]: row for row in learning_table(results).rows}
    assert rows["local"][-1].endswith("(2/3)")
    assert rows["simplicial"][-1] == "not reached"
    assert rows["attention"][2] == "baseline"


def test_the_readmes_figure_is_the_studys_learning_curves(study, tmp_path):
    results = read_results(study / "results.json")
    assert set(study_figures(results)) == {"exact_match", "loss", "tokens_to_90", "tokens_to_99", "final"}
    text = figure_for_readme(results, tmp_path / "figure.svg").read_text()
    assert "simplicial</text>" in text


def test_what_is_not_a_run_or_a_study_is_refused_in_one_line(tmp_path):
    for name, content in (("results.json", "{"), ("other.json", "[]"), ("old.json", '{"schema": 0}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=name):
            write_report(tmp_path / name)
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="neither a run's folder"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        write_report(tmp_path / "absent")
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(UserError, match=r"no results\.json yet"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("task: {kind: addition}")
    with pytest.raises(UserError, match="no metrics yet"):
        write_report(tmp_path)


def test_the_reports_modules_do_not_load_matplotlib_before_they_draw():
    code = "import trivium.report.run, sys; print([m for m in ('matplotlib', 'jinja2', 'torch') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"

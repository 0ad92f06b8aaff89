"""The page that shows what a model looked at, in a real browser, and its maps as files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.report.browser import CHROMIUM, browsing
from trivium.evaluate.trace import trace
from trivium.model.context import model_context
from trivium.model.decoder import DecoderConfig
from trivium.report.attention import save_panels, write_attention_page
from trivium.tasks.addition import AdditionConfig

LAYERS = "attention + simplicial(window1=6, window2=3) + gla"


@pytest.fixture(scope="module")
def traced():
    task = AdditionConfig(format="reversed").build()
    config = DecoderConfig(width=16, heads=2, layers=LAYERS)
    torch.manual_seed(0)
    return trace(config.build(model_context(task, config)), task, task.parse("101+22"))


def cell(row, column, tokens):
    """Return where on a map of so many tokens a cell lies."""
    return (column + 0.5) / tokens, (row + 0.5) / tokens


def longer(found, tokens):
    """Return a trace of so many tokens, of two heads."""
    shares_HTT = np.random.default_rng(0).dirichlet(np.ones(tokens), size=(2, tokens)).astype(np.float32)
    panel = replace(found.panels[0], weights_HTT=np.tril(shares_HTT))
    return replace(
        found,
        tokens=["1"] * tokens,
        significance=[1] * tokens,
        probabilities=[None] * tokens,
        alternatives=[[]] * tokens,
        panels=[panel],
    )


def written(path, found, title="101+22"):
    return write_attention_page(path, title=title, subtitle="a run", described=found.described(), arrays=found.arrays())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_person_points_chooses_and_saves_and_nothing_leaves_the_page(traced, tmp_path):
    path = written(tmp_path / "page.html", traced)
    tokens = traced.panels[0].weights_HTT.shape[1]
    with browsing(tmp_path / "profile") as page:
        page.open(path)
        assert page.evaluate("document.querySelectorAll('#grid button').length") == 7  # 3 layers of 2 heads, the model
        assert page.evaluate("document.querySelectorAll('.token.given').length") == traced.prompt

        page.point("#map .cells", at=cell(4, 2, tokens))
        weight = traced.panels[0].weights_HTT[0, 4, 2]
        page.until(f"document.getElementById('hint').textContent === 'token 5 2 reads token 3 1: {weight:.3f}'")
        assert page.evaluate("[...document.querySelectorAll('.token.marked')].map((t) => t.dataset.place)") == [
            "2",
            "4",
        ]

        page.point("#grid button[data-panel='1'][data-head='1']", click=True)
        page.until("document.getElementById('name').textContent === 'layer 2, head 2: Simplicial'")
        page.point("#map .cells", at=cell(5, 3, tokens), click=True)
        page.until("document.getElementById('pairname').textContent.includes('token 6')")
        pair = traced.panels[1].pairs_HTTT[1, 5, 3, 4]
        page.point("#pairs .cells", at=cell(3, 4, tokens))
        page.until(f"document.getElementById('hint').textContent.endsWith('token 4 + and token 5 2: {pair:.3f}')")

        page.point("#grid button[data-panel='2'][data-head='0']", click=True)
        page.until("document.getElementById('pairfigure').hidden")
        page.point(".token[data-place='8']")
        page.until("document.getElementById('hint').textContent.includes('probability')")
        for kind in ("svg", "png"):
            page.point(f"[data-save='{kind}'][data-from='map']", click=True)
            page.until(f"(document.body.dataset.saved || '').includes('layer-3-head-1-GLA-map.{kind} ')")
            assert int(page.evaluate("document.body.dataset.saved.split(' ')[1]")) > 1000
        # The darkest dot of a map is where its largest weight is.
        dots = (
            "(() => { const c = document.querySelector(\"#grid button[data-panel='0'][data-head='0'] canvas\"); "
            "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; "
            "return [...Array(c.width * c.height).keys()].map((i) => d[4 * i] + d[4 * i + 1] + d[4 * i + 2]); })()"
        )
        found = np.array(page.evaluate(dots))
        weights = traced.panels[0].weights_HTT[0].ravel()
        assert found[weights.argmax()] == found.min() < 400
        assert (found[weights == 0] == 3 * 255).all()

        long = longer(traced, 450)
        page.open(written(tmp_path / "long.html", long))
        page.point("#map .cells", at=cell(440, 3, 450))
        weight = long.panels[0].weights_HTT[0, 440, 3]
        page.until(f"document.getElementById('hint').textContent.endsWith(': {weight:.3f}')")
        assert page.evaluate("document.querySelectorAll('*').length") < 12 * 450
        assert page.errors == []
        outside = [
            address for address in page.requests if not address.startswith(("file:", "data:", "blob:", "about:"))
        ]
        assert outside == []


def test_the_page_holds_everything_and_names_no_other_place(traced, tmp_path):
    text = written(tmp_path / "page.html", traced).read_text()
    for sign in ("https://", '<link rel="stylesheet', 'src="', "@import"):
        assert sign not in text
    assert text.count("http://") == text.count("http://www.w3.org/2000/svg")  # the name of a language, not a place


def test_what_tokens_say_stays_text(traced, tmp_path):
    described = {**traced.described(), "tokens": ["</script><script>alert(1)</script>", *traced.tokens[1:]]}
    path = write_attention_page(
        tmp_path / "page.html", title="<b>", subtitle="", described=described, arrays=traced.arrays()
    )
    text = path.read_text()
    assert "<script>alert" not in text
    assert "<h1>&lt;b&gt;</h1>" in text


def test_every_map_is_written_for_a_paper(traced, tmp_path):
    files = save_panels(tmp_path, described=traced.described(), arrays=traced.arrays())
    # Two heads of three layers, the second keys' marginals of the simplicial one, and the whole model; two files each.
    assert len(files) == len(set(files)) == 2 * (6 + 2 + 1)
    assert {path.suffix for path in files} == {".png", ".svg"}
    assert all(path.stat().st_size > 500 for path in files)


def test_a_stored_trace_is_read_again(traced, tmp_path):
    from safetensors.numpy import load_file

    from trivium.evaluate.trace import save_trace

    arrays, described = save_trace(traced, tmp_path / "deep" / "one")
    found = load_file(arrays)
    assert set(found) == set(traced.arrays())
    assert all(np.array_equal(found[name], array) for name, array in traced.arrays().items())
    assert json.loads(described.read_text())["tokens"] == traced.tokens

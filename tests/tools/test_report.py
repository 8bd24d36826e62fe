import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.report import Reporter, StepRecord, read_metrics
from bigbatch.recipes.gpt.config import GptConfig
from bigbatch.tools.report import main, report
from bigbatch.tools.report_chart import compact, linear_axis, log_axis, smooth, thin_out
from bigbatch.tools.report_run import read_run, summarize

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")


def make_run(run_dir, learning_rate=1e-3, last_step=300, sample="What light is this?", killed_at=None):
    """Let a Reporter write a run of made-up figures, optionally killed once and resumed from step 100."""
    run_dir.mkdir()
    document = {
        "version": 1,
        "about": {"purpose": "Write like Shakespeare.", "needs": "a laptop", "expect": "1.5"},
        "batch": {"global_size": 4},
        "optimizer": {"learning_rate": learning_rate},
        "schedule": {"total_steps": 300},
        "model": {"num_layers": 2},
        "data": {"train": ["plays.txt"], "sequence_length": 32},
        "report": {"tensorboard": False},
    }
    config = GptConfig.model_validate_json(json.dumps(document))
    (run_dir / "run.json").write_text(config.model_dump_json())
    (run_dir / "deepspeed.json").write_text('{"zero_optimization": {"stage": 1}}')
    (run_dir / "environment.json").write_text('{"content_id": "9f2c41d07ab3", "packages": {"torch": "2.13.0"}}')
    if killed_at:
        run_session(run_dir, config, 0, killed_at, sample)
    run_session(run_dir, config, 100 if killed_at else 0, last_step, sample)
    return run_dir


def run_session(run_dir, config, start_step, last_step, sample):
    it = Reporter(
        run_dir,
        config,
        is_writer=True,
        total_steps=300,
        start_step=start_step,
        num_ranks=2,
        tokens_per_sample=32,
        flops_per_sample=1e9,
        peak_flops=1e10,
        start_up_seconds=2.0,
    )
    for step in range(start_step + 1, last_step + 1):
        loss = 1.5 + 3 * math.exp(-step / 60)
        it.step(StepRecord(step, loss, config.optimizer.learning_rate, 0.5 + 1 / step, 128, 4, 4 * step, 0.5))
        if step % 100 == 0:
            it.evaluation(step, {"loss": loss + 0.1, "perplexity": math.exp(loss + 0.1), "accuracy": step / 1000}, 3.0)
            it.text(step, [{"prompt": "ROMEO:", "text": f"ROMEO: {sample}"}], 1.0)
            it.event(step, "saved", f"checkpoints/step_{step:08}", 0.5)
    it.close()


def chromium(profile, *arguments):
    """Run a headless browser without any network and return its process."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", f"--user-data-dir={profile}"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=True)


class Page(HTMLParser):
    """What a browser made of a page: its elements with their attributes, and the text of each."""

    def __init__(self, source):
        super().__init__()
        self.elements = []
        self.words = self.title = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data
        if self.lasttag == "title":
            self.title += data

    def paths(self, look):
        return [a["d"] for tag, a in self.elements if tag == "path" and look in a.get("class", "").split()]


def browse(tmp_path, page):
    """Open a page, return its DOM as it is after the scripts ran, and what the console said."""
    done = chromium(tmp_path / "profile", "--dump-dom", page.as_uri())
    return Page(done.stdout), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def without_policy(page, extra_script=""):
    """Copy the page without its content security policy, so that escaping alone has to hold."""
    source, count = re.subn(r"<meta http-equiv=.Content-Security-Policy.[^>]*>", "", page.read_text())
    assert count == 1
    copy = page.with_name("without_policy.html")
    copy.write_text(source.replace("</body>", f"<script>{extra_script}</script></body>"))
    return copy


def num_points(path):
    return len(re.findall("[ML]", path))


@needs_chromium
def test_a_browser_draws_every_point_and_has_nothing_to_complain_about(tmp_path):
    page = report([make_run(tmp_path / "shakespeare", killed_at=150)])
    assert page == tmp_path / "shakespeare" / "report.html"
    dom, console = browse(tmp_path, page)
    assert console == []
    # Loss, faint and smoothed, on linear and on logarithmic axes; 30 reports survive the kill.
    assert [num_points(path) for path in dom.paths("faint")] == [30, 30]
    solid = [a["d"] for tag, a in dom.elements if tag == "path" and re.fullmatch(r"c\d line", a["class"])]
    assert [num_points(path) for path in solid] == [30] * 5
    # Three validations: in the loss twice, and the accuracy's own curve; each as line and as dots.
    assert [num_points(path) for path in dom.paths("dotted")] == [3] * 3
    assert [num_points(path) for path in dom.paths("dots")] == [3] * 3
    assert [num_points(path) for path in dom.paths("saved")][:2] == [3, 3]
    assert [path.count("V") for path in dom.paths("resumed")][:2] == [1, 1]
    for figure in ("loss", "learning-rate", "grad-norm", "throughput", "evaluation-accuracy"):
        assert ("figure", {"class": "chart", "id": figure}) in dom.elements
    for words in ("Write like Shakespeare.", "What light is this?", "9f2c41d07ab3", "plays.txt", "resumed", "finished"):
        assert words in dom.words


@needs_chromium
def test_the_console_of_a_page_that_fails_is_seen(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<script>undefinedFunction()</script>")
    _, console = browse(tmp_path, page)
    assert "undefinedFunction" in console[0]


@needs_chromium
def test_pointing_at_a_curve_shows_its_numbers(tmp_path):
    page = report([make_run(tmp_path / "shakespeare")])
    script = """
      const area = document.querySelector("#loss .linear .area"), box = area.getBoundingClientRect();
      const x = box.left + box.width * (200 - 10) / (300 - 10);
      area.dispatchEvent(new PointerEvent("pointermove", {clientX: x, clientY: box.top + 9}));
    """
    done = chromium(tmp_path / "profile", "--dump-dom", without_policy(page, script).as_uri())
    readout = re.search(r'<div class="readout"[^>]*>(.*?)</div>', done.stdout)[1]
    words = re.sub("<[^>]+>", " ", readout).split()
    assert words[:2] == ["step", "200"]
    reported = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "shakespeare").train}
    training, validation = float(words[words.index("training") + 1]), float(words[words.index("validation") + 1])
    assert training == pytest.approx(reported[200], rel=1e-4)
    assert validation == pytest.approx(1.6 + 3 * math.exp(-200 / 60), rel=1e-4)


PAYLOADS = (
    '</script><script>document.title="owned"</script><b id="owned">',
    "<img src=x onerror=\"document.title='owned'\">",
    "\"'><svg onload=document.title='owned'>",
)


@needs_chromium
@pytest.mark.parametrize("keep_policy", [True, False])
def test_text_from_a_model_a_name_or_a_setting_stays_text(tmp_path, keep_policy):
    payload = "".join(PAYLOADS)
    first = make_run(tmp_path / payload.replace("/", "\N{FRACTION SLASH}"), sample=payload)
    environment = {payload: payload, "content_id": payload, payload + "2": {payload: [payload]}}
    (first / "environment.json").write_text(json.dumps(environment))
    with (first / "metrics.jsonl").open("a") as file:
        for line in (
            {"kind": "event", "step": 300, "time": 2e9, "event": payload, "message": payload},
            {"kind": "evaluation", "step": 300, "time": 2e9, "seconds": 0, "loss": 1.0, payload: 1.0},
        ):
            file.write(json.dumps(line) + "\n")
    second = make_run(tmp_path / "second", learning_rate=2e-3)
    for page in (report([first]), report([first, second], tmp_path / "both.html")):
        dom, console = browse(tmp_path, page if keep_policy else without_policy(page))
        assert console == []
        assert dom.title != "owned"
        assert not [tag for tag, attributes in dom.elements if tag == "img" or attributes.get("id") == "owned"]
        assert not [attributes for _, attributes in dom.elements if "onload" in attributes or "onerror" in attributes]
        assert dom.words.count('document.title="owned"') > 5


def test_the_page_asks_the_network_for_nothing(tmp_path):
    source = report([make_run(tmp_path / "shakespeare")]).read_text()
    assert "default-src 'none'" in source
    for sign in ("http:", "https:", "//", "@import", "url(", " src=", "srcset", "fetch(", "XMLHttpRequest"):
        assert sign not in source.replace("// ", ""), sign
    assert re.findall(r'<link [^>]*href="([^"]*)"', source) == ["data:,"]


@needs_chromium
@pytest.mark.parametrize(
    ("scheme", "paper", "curve"), [("light", (246, 247, 249), (0, 104, 168)), ("dark", (16, 19, 23), (86, 174, 240))]
)
@pytest.mark.parametrize("width", [1240, 500])
def test_the_picture_has_its_colors_in_light_and_dark_and_fits_the_window(tmp_path, scheme, paper, curve, width):
    page = report([make_run(tmp_path / "shakespeare")])
    shot = tmp_path / "shot.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    chromium(tmp_path / "profile", *dark, f"--window-size={width},1900", f"--screenshot={shot}", page.as_uri())
    picture = Image.open(io.BytesIO(shot.read_bytes())).convert("RGB")
    counts = {color: count for count, color in picture.getcolors(picture.width * picture.height)}
    assert max(counts, key=counts.get) in (paper, (255, 255, 255), (24, 28, 34))
    assert counts[paper] > 10_000
    assert counts[curve] > 1_000
    # Nothing sticks out to the right: the margin there is as empty as the one on the left.
    margin = picture.crop((width - 8, 0, width, 1900)).getcolors(1_000_000)
    assert sum(count for count, color in margin if color == paper) > 0.99 * 8 * 1900


def test_the_headline_figures_agree_with_the_run(tmp_path):
    summary = summarize(read_run(make_run(tmp_path / "shakespeare", killed_at=150)))
    assert (summary.state, summary.last_step, summary.total_steps, summary.restarts) == ("finished", 300, 300, 1)
    assert summary.evaluation["loss"] == pytest.approx(1.6 + 3 * math.exp(-5))
    assert (summary.best_loss, summary.best_step) == (summary.evaluation["loss"], 300)
    assert (summary.num_samples, summary.num_tokens) == (1200, 1200 * 32)
    assert summary.samples_per_second == pytest.approx(8.0)
    assert summary.tokens_per_second == pytest.approx(8.0 * 32)
    assert summary.utilization == pytest.approx(8.0 * 1e9 / 2e10)
    # 300 steps counted, 50 were repeated; evaluation, text, saving and start-up took 3, 1, 0.5 and 2 seconds a time.
    assert summary.goodput == pytest.approx(150 / (150 + 25 + 4 * 0 + 3 * 3 + 3 * 1 + 3 * 0.5 + 2 * 2), rel=1e-3)


def test_a_run_that_was_cut_short_says_so(tmp_path):
    stopped = make_run(tmp_path / "stopped", last_step=120)
    assert summarize(read_run(stopped)).state == "stopped after step 120"
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert summarize(read_run(stopped)).state == "running or killed"
    failed = {"kind": "event", "step": 120, "time": 2e9, "event": "failed", "message": "out of memory"}
    (stopped / "metrics.jsonl").write_text("".join([*lines[:-1], json.dumps(failed) + "\n", lines[-1]]))
    assert summarize(read_run(stopped)).state == "failed after step 120"


STARTED = '{"kind": "event", "step": 0, "time": 1, "event": "started", "message": ""}\n'


@pytest.mark.parametrize("lines", [None, "", STARTED])
def test_a_run_without_figures_gets_plain_sentences(tmp_path, lines):
    (tmp_path / "run.json").write_text('{"version": 1}')
    if lines is not None:
        (tmp_path / "metrics.jsonl").write_text(lines)
    source = report([tmp_path]).read_text()
    assert "No training step has been reported yet." in source
    assert "No samples of text have been generated yet." in source
    assert "There is no environment.json in this run folder." in source
    assert source.count("Nothing to show yet.") == 4
    report([tmp_path, tmp_path], tmp_path / "both.html")


def test_a_run_whose_figures_were_never_finite_still_has_a_page(tmp_path):
    (tmp_path / "run.json").write_text('{"version": 1}')
    config = GptConfig.model_validate_json(
        '{"version": 1, "batch": {"global_size": 1}, "optimizer": {"learning_rate": 1},'
        ' "report": {"tensorboard": false}, "schedule": {"total_steps": 10},'
        ' "data": {"train": ["x"], "sequence_length": 8}}'
    )
    it = Reporter(tmp_path, config, is_writer=True, total_steps=10)
    for step in range(1, 11):
        it.step(StepRecord(step, math.nan, 1.0, math.inf, 8, 1, step, 0.1))
    it.evaluation(10, {"loss": math.nan})
    it.close()
    source = report([tmp_path]).read_text()
    assert "never finite" in source
    assert "NaN" not in source and "nan<" not in source


def test_several_runs_are_laid_over_each_other_with_the_settings_that_differ(tmp_path):
    runs = [make_run(tmp_path / "slow", learning_rate=1e-3), make_run(tmp_path / "fast", learning_rate=2e-3)]
    source = report(runs, tmp_path / "both.html").read_text()
    dom = Page(source)
    assert "2 runs compared" in dom.words
    assert {a["class"].split()[0] for tag, a in dom.elements if tag == "path" and "line" in a["class"]} == {"c0", "c1"}
    table = source.split('id="differences"')[1].split("</section>")[0].replace("<wbr>", "")
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
    assert rows == [["Setting", "slow", "fast"], ["optimizer.learning_rate", "0.001", "0.002"]]


def test_the_command_prints_where_the_page_is(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "shakespeare", last_step=20)
    capsys.readouterr()
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    monkeypatch.chdir(tmp_path)
    assert main([str(run), str(run)]) == 0
    assert capsys.readouterr().out == "comparison.html\n"
    assert (tmp_path / "comparison.html").exists()


def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: is no run folder"):
        report([tmp_path])


@pytest.mark.parametrize(("text", "problem"), [("{", "is no JSON"), ("[]", "a list where an object belongs")])
def test_a_damaged_document_is_refused_by_name(tmp_path, text, problem):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "deepspeed.json").write_text(text)
    with pytest.raises(UserError, match=f"deepspeed.json: .*{problem}"):
        report([tmp_path])


def test_a_page_that_cannot_be_written_is_one_line_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="can't be written: No such file or directory"):
        report([tmp_path], tmp_path / "nowhere" / "report.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="can't be written: Is a directory"):
        report([tmp_path], tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "run.json"]


@given(st.lists(st.one_of(st.none(), st.floats(-1e9, 1e9)), min_size=1, max_size=300), st.integers(10, 40))
def test_thinning_out_keeps_the_extremes_and_the_order(values, max_points):
    points = list(enumerate(values))
    thin = thin_out(points, max_points)
    assert len(thin) <= max_points + 2
    assert thin == sorted(set(thin), key=lambda point: point[0]) and set(thin) <= set(points)
    known = [value for value in values if value is not None]
    if known:
        kept = [value for _, value in thin if value is not None]
        assert (min(kept), max(kept)) == (min(known), max(known))


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6))
def test_an_axis_holds_its_data_and_its_ticks(low, width):
    high = low + width
    axis = linear_axis(low, high, whole_steps=True)
    tolerance = 1e-5 * (axis.high - axis.low)
    assert axis.low <= low + tolerance and axis.high >= high - tolerance
    assert 3 <= len(axis.ticks) <= 8
    assert all(-1e-9 <= axis.place(tick) <= 1 + 1e-9 for tick in axis.ticks)


@given(st.floats(1e-6, 1e6), st.floats(1.01, 1e6))
def test_a_logarithmic_axis_has_ticks_and_maps_its_ends(low, ratio):
    axis = log_axis(low, low * ratio)
    assert len(axis.ticks) >= 2
    assert axis.place(axis.low) == 0 and axis.place(axis.high) == pytest.approx(1)
    assert axis.place(math.sqrt(axis.low * axis.high)) == pytest.approx(0.5)


@given(st.floats(-10, 10), st.floats(-1, 1), st.integers(1, 400))
def test_smoothing_leaves_a_straight_line_as_it_is(start, slope, length):
    line = [(step, start + slope * step) for step in range(length)]
    smoothed = smooth(line)
    assert [step for step, _ in smoothed] == [step for step, _ in line]
    assert [value for _, value in smoothed] == pytest.approx([value for _, value in line], abs=1e-9)


def test_smoothing_takes_most_of_the_noise_away():
    noisy = [(step, 1.0 if step % 2 else -1.0) for step in range(1000)]
    assert max(abs(value) for _, value in smooth(noisy)[20:-20]) < 0.1


def test_numbers_are_written_compactly():
    values = (0, 0.25, 0.01, 3e-4, 1.25e-5, 999, 1000, 12_345, 1_500_000, 4.2e12, -2500)
    assert [compact(value) for value in values] == [
        "0",
        "0.25",
        "0.01",
        "3e-4",
        "1.25e-5",
        "999",
        "1k",
        "12.35k",
        "1.5M",
        "4.2T",
        "-2.5k",
    ]

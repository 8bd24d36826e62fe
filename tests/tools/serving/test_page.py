"""The page that tries a model: in a browser that runs its script and types for us."""

import asyncio
import re
import shutil
import subprocess

import pytest

from bigbatch.tools.serving.opening import Served
from bigbatch.tools.serving.page import docs_page, page_headers, try_page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
SEND = '<img src="late"><script>%s; document.getElementById("ask").requestSubmit();</script></body>'
"""The browser waits for the image, so that what it shows in the end has the answer."""


def browse(tmp_path, client, path="/", *flags):
    """Open a page; return what is there in the end, and the browser's complaints."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--enable-logging=stderr", f"--user-data-dir={tmp_path}"]
    command += [*flags, "--dump-dom", client.url + path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


async def late():
    await asyncio.sleep(3)


@needs_chromium
@pytest.mark.parametrize("kind", ["labels", "chat"])
def test_a_browser_shows_what_the_model_says(tmp_path, serve, chatting, monkeypatch, kind):
    from bigbatch.tools.serving import app

    def judge(texts):
        return [{"label": "<b>good</b>", "probability": 0.75, "probabilities": {"<b>good</b>": 0.75, "bad": 0.25}}]

    served = chatting if kind == "chat" else Served("judge", "classify", "torch", predict=judge)
    typed = SEND % 'document.getElementById("in-text").value = "Hi there"'
    monkeypatch.setattr(app, "page_headers", lambda text: {})
    monkeypatch.setattr(app, "try_page", lambda *given: try_page(*given).replace("</body>", typed))
    if kind == "chat":
        typed = typed.replace("; ", '; document.getElementById("in-max_tokens").value = 8; ', 1)
    with serve(served) as client:
        client.server.app.add_api_route("/late", late)
        page, complaints = browse(tmp_path, client)
    assert complaints == []
    assert re.search(r'id="took">[\d,]+ ms<', page)
    shown = page[page.index('id="answer"') :]
    if kind == "chat":
        assert '<div class="said user">Hi there</div><div class="said">' in shown
    else:
        assert '<p class="big">&lt;b&gt;good&lt;/b&gt;</p>' in shown
        assert "75.0 %" in shown
        assert "25.0 %" in shown


@needs_chromium
def test_a_browser_draws_the_api_under_the_page_s_own_policy(tmp_path, talk):
    page, complaints = browse(tmp_path, talk, "/docs", "--virtual-time-budget=8000")
    assert complaints == []
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health"):
        assert f"<code>{path}</code>" in page
    assert "<code>max_completion_tokens</code>" in page


def test_pages_load_nothing_from_elsewhere_and_hold_names_as_text():
    served = Served("<img src=x>", "classify", "torch", fields=("left", "</script>"))
    for page in (try_page(served, True), docs_page(served, True)):
        assert "<img" not in page
        assert not re.search(r"https?://|src=|@import", page.replace("img src=x", ""))
        assert page.count("</script>") == 2
        assert "script-src 'sha256-" in page_headers(page)["Content-Security-Policy"]

"""The page for picks in a real browser: a headless Chromium, where one is installed."""

import pytest

from browser import Browser, chromium
from helpers import HOSTILE
from serving import asked, lines_of, run_of, serving

pytestmark = pytest.mark.skipif(not chromium(), reason="no Chromium is installed")

LOOKS = [(390, 844, False), (390, 844, True), (1280, 800, False), (1280, 800, True)]

ATTACKS = [HOSTILE, '<img src=x onerror="window.hit=1">', "</script><script>window.hit=1</script>",
           "<style>*{display:none}</style>", "&lt;b&gt; <b>bold</b> \u202e" + "w" * 120]

TAME = ["Sing a song", "Sing a song!", "Sing a song", "", "\u0645\u0631\u062d\u0628\u0627\ntwo"]

DRAFTS = "[...document.querySelectorAll('.draft')]"

MOMENT = "new Promise(done => setTimeout(done, 100))"

# Press n, and again as soon as the next post is there, which nobody has read by then. The time is
# set anew, as if this computer were never busy; true if it had been set.
TWICE = """new Promise(done => {
const began = performance.now();
const press = () => document.dispatchEvent(new KeyboardEvent('keydown', {key: 'n'}));
new MutationObserver((all, watch) => {
  watch.disconnect();
  setTimeout(() => {
    const noted = shownAt > began;
    shownAt = performance.now();
    press();
    done(noted);
  }, 0);
}).observe(document.querySelector('#count'), {childList: true});
press();
})"""

# The smallest contrast (WCAG 2) between a text and what is behind it.
CONTRAST = """(() => {
const light = c => c.match(/[0-9.]+/g).slice(0, 3).map(x => x / 255)
  .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
const behind = e => {
  for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (c !== 'rgba(0, 0, 0, 0)') return c;
  }
};
return Math.min(...['h1', '#count', '#post', '.text', '.near .text', '.note', '.number', '#none',
  '#undo'].map(name => {
  const e = document.querySelector(name), a = light(getComputedStyle(e).color);
  const b = light(behind(e));
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}))})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def runs(tmp_path):
    return [run_of(tmp_path / "a", "a", lambda i: ATTACKS), run_of(tmp_path / "b", "b",
                                                                   lambda i: TAME)]


def show(browser, client, item=0):
    """Wait until the page shows an item, and takes picks for it."""
    browser.wait(f"document.querySelector('#count').textContent === '{item + 1} of 6'")
    browser.wait("performance.now() > shownAt + PAUSE")
    state = client.state()
    assert state["item"]["number"] == item
    return [draft["text"] for draft in state["item"]["drafts"]]


@pytest.mark.slow
@pytest.mark.parametrize("width, height, dark", LOOKS)
def test_the_page_fits_and_hostile_drafts_stay_text(browser, runs, tmp_path, width, height, dark):
    phone = width < 640
    with serving(asked(runs, tmp_path / "p.jsonl", "--k", "5")) as client:
        browser.requests.clear()
        browser.look(width, height, dark, phone)
        browser.open(client.server.address)
        texts = show(browser, client)
        shown = browser.run(DRAFTS + ".map(e => e.querySelector('.text').textContent)")
        assert shown == [text or "(empty)" for text in texts] and HOSTILE in shown
        assert browser.run("[document.scripts.length, document.images.length, window.hit || 0, "
                           "document.querySelectorAll('style').length]") == [1, 0, 0, 1]
        # nothing is wider than the window, everything is large enough for a finger
        assert browser.run("document.documentElement.scrollWidth") == width
        boxes = browser.run("[...document.querySelectorAll('button')].filter(e => e.offsetParent)"
                            ".map(e => e.getBoundingClientRect()).map(b => [b.x, b.right, "
                            "b.height])")
        assert len(boxes) == len(texts) + 2
        assert all(0 <= left and right <= width and tall >= 44 for left, right, tall in boxes)
        assert browser.run(CONTRAST) >= 4.5
        paper = browser.run("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
        assert browser.run("getComputedStyle(document.querySelector('#keys')).display"
                           " === 'none'") == phone
        marked = browser.run(DRAFTS + ".filter(e => e.matches('.near')).map(e => "
                             "e.querySelector('.note').textContent)")
        [note] = marked
        song = texts.index("Sing a song"), texts.index("Sing a song!")
        assert note.endswith(f"nearly the same as {min(song) + 1}")
        assert browser.run(f"{DRAFTS}[{texts.index('')}].disabled")
        # a pick by finger or mouse
        browser.point(f"li:nth-child({texts.index(HOSTILE) + 1}) .draft", phone)
        show(browser, client, 1)
        assert browser.run("scrollY") == 0
        assert [line["reply"] for line in lines_of(tmp_path / "p.jsonl")] == [HOSTILE]
        assert all(url.startswith((client.server.address, "data:")) for url in browser.requests)
    assert browser.errors == []


@pytest.mark.slow
def test_keys_pick_and_the_page_goes_on_where_the_person_stopped(browser, runs, tmp_path):
    out = tmp_path / "p.jsonl"
    browser.look(1280, 800, False, False)
    with serving(asked(runs, out, "--k", "5")) as client:
        browser.open(client.server.address)
        texts = show(browser, client)
        place = 1 if texts[0] == "" else 0
        browser.press(str(place + 1), autoRepeat=True)             # held down
        browser.run(MOMENT)
        assert lines_of(out) == []
        for _ in range(3):
            browser.press(str(place + 1))
        show(browser, client, 1)
        assert browser.run(TWICE)
        browser.run(MOMENT)
        show(browser, client, 2)
        browser.press("0")
        show(browser, client, 3)
        assert [line["pick"] for line in lines_of(out)] == [place, None, None]
        browser.press("u")
        texts = show(browser, client, 2)
        # keys of the browser itself, of no draft, and of an empty one
        browser.press("1", modifiers=2)
        browser.press("x")
        browser.press(str(texts.index("") + 1))
        browser.run(MOMENT)
        assert len(lines_of(out)) == 2
        browser.point("#none", False)
        show(browser, client, 3)
        browser.point("#undo", False)
        show(browser, client, 2)
    with serving(asked(runs, out, "--k", "5")) as client:
        browser.open(client.server.address)
        for number in range(2, 6):
            show(browser, client, number)
            browser.press("n")
        browser.wait("!document.querySelector('#end').hidden")
        assert browser.run("document.querySelector('#none').hidden")
        assert len(lines_of(out)) == 6 and browser.errors == []


@pytest.mark.slow
def test_a_person_is_told_when_a_pick_was_not_saved(browser, runs, tmp_path):
    out = tmp_path / "p.jsonl"
    error = "document.querySelector('#error').hidden ? '' : document.querySelector('#error span')" \
            ".textContent"
    browser.look(390, 844, True, True)
    with serving(asked(runs, out, "--k", "5")) as client:
        browser.open(client.server.address)
        show(browser, client)
        browser.send("Network.emulateNetworkConditions", offline=True, latency=0,
                     downloadThroughput=-1, uploadThroughput=-1)
        browser.point("#none", True)
        browser.wait(f"({error}).includes('does not answer')")
        assert lines_of(out) == []
        browser.send("Network.emulateNetworkConditions", offline=False, latency=0,
                     downloadThroughput=-1, uploadThroughput=-1)
        browser.point("#error button", True)
        browser.wait(f"({error}) === ''")
        # in another tab
        client.pick(0, None)
        browser.wait("performance.now() > shownAt + PAUSE")
        browser.point("#none", True)
        browser.wait(f"({error}).includes('already')")
        show(browser, client, 1)
        assert len(lines_of(out)) == 1
        out.write_text("")
        browser.point("#none", True)
        browser.wait(f"({error}).includes('another program')")
        client.server.answers.ended = True
        browser.point("#none", True)
        browser.wait(f"({error}).includes('has ended')")
        assert out.read_text() == ""
    browser.errors.clear()                   # the console names each refused request

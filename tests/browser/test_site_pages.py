"""The site in a browser, opened from its folder: no page complains, none asks a network, none is wider than a phone, the search finds.

A site that `make docs` left here and that is not older than its sources is looked at; else one is built from the notebooks as they are stored."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import build  # noqa: E402

pytest.importorskip("sphinx")              # now, since it sets a filter of its own when it is imported
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")      # myst-parser's, many thousand
MOST = 2_000_000                            # bytes of a page with its pictures
SHARED = {"tex-svg.js", "embed.js"}         # loaded by many pages, kept by the browser


def up_to_date(site):
    "Whether a site is there that is not older than what it is made of."
    sources = [path for folder in ("nbs", "docs", "crossmodal", "results") for path in (ROOT / folder).rglob("*")
               if path.is_file() and "node_modules" not in path.parts and "__pycache__" not in path.parts]
    return (site / "index.html").exists() and (site / "index.html").stat().st_mtime >= max(path.stat().st_mtime for path in sources)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if up_to_date(build.SITE): return build.SITE
    if shutil.which("npm") is None: pytest.skip("no npm here, which `make docs` needs")
    place, home = tmp_path_factory.mktemp("docs"), Path.cwd()
    try: scripts = build.vendor(build.WORK / "vendor")
    except subprocess.CalledProcessError: pytest.skip("npm could not fetch the site's scripts")
    shutil.copytree(scripts, place / "work/vendor")
    build.WORK, build.SITE = place / "work", place / "site"
    try: build.build(stored=True)
    finally: os.chdir(home)
    return build.SITE


@pytest.fixture
def visit(page, site):
    "Open a page of the site; every request that leaves the folder is a complaint."
    page.on("request", lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else page.complaints.append(f"asked for {request.url}"))
    return lambda name, asked="": page.goto((site / name).as_uri() + asked)


def names(site): return sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))


def test_pages_are_small(site):
    large = {}
    for name in names(site):
        page = build.Page((site / name).read_text(encoding="utf-8"))
        files = {((site / name).parent / load.partition("?")[0]).resolve() for load in page.loads if not re.match(r"(https?:|data:|//)", load)}
        size = (site / name).stat().st_size + sum(file.stat().st_size for file in files if file.is_file() and file.name not in SHARED)
        if size > MOST: large[name] = size
    assert large == {}


def test_a_crawl_at_a_phones_width(visit, page, site):
    "Every page: no error in the console, no request, nothing wider than the screen, widgets shown, figures with a name."
    page.set_viewport_size({"width": 390, "height": 844})
    faults = []
    for name in names(site):
        page.complaints.clear()
        visit(name)
        if page.locator("script[type='application/vnd.jupyter.widget-view+json']").count(): page.locator(".jupyter-widgets").first.wait_for()
        page.evaluate("() => window.MathJax?.startup?.promise?.then(() => null)")           # formulas are set
        faults += [f"{name}: {complaint}" for complaint in page.complaints]
        if (width := page.evaluate("document.documentElement.scrollWidth")) > 390: faults.append(f"{name}: {width} pixels wide")
        unnamed = page.evaluate("[...document.querySelectorAll('article img')].filter(image => !image.alt).length")
        if unnamed: faults.append(f"{name}: {unnamed} figures without a name")
    assert len(names(site)) > 100 and faults == []


def test_formulas_are_set(visit, page):
    visit("losses/03_ranking.html")
    page.locator("mjx-container svg").first.wait_for()
    assert page.locator("mjx-merror").count() == 0 and page.complaints == []


def test_the_search_finds_a_function_and_a_word(visit, page):
    for words, where in (("order_similarity", "api/metrics.retrieval.html"), ("krippendorff", "metrics/08_human.html")):
        visit("search.html", f"?q={words}")
        page.locator(f"#search-results a[href*='{where}']").first.wait_for()
    assert page.complaints == []


def test_the_dark_mode_is_dark(visit, page):
    brightness = "(() => { const [r, g, b] = getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number); return (r + g + b) / 3 })()"
    visit("index.html")
    assert page.evaluate(brightness) > 200
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(brightness) < 60
    page.emulate_media(color_scheme="light")
    page.locator(".theme-toggle-content button.theme-toggle, .content-icon-container button.theme-toggle").first.click()
    assert page.evaluate("document.body.dataset.theme") in ("dark", "light") and page.complaints == []


def test_a_reader_gets_from_a_paper_to_the_code_and_back(visit, page):
    visit("papers.html")
    page.locator("article a", has_text="Look, imagine and match").first.click()
    page.locator("article a", has_text="systems.gxn").first.click()
    page.wait_for_url("**/api/systems.gxn.html#module-crossmodal.systems.gxn")
    page.locator("article a", has_text="In its chapter").first.click()
    page.wait_for_url("**/systems/03_gxn.html#*")
    assert page.complaints == []

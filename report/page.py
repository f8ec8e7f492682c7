"""The HTML page of a report: one file that asks nobody for anything, with tables, pictures and
completions side by side.

Every text that a model or a file gave is escaped, and its control and direction marks are made
harmless. The stand-alone pictures are drawn for white ground; inside the page a style sheet
gives their few colours other values in dark mode. The script only pages through the posts:
without it all of them are shown."""

import base64
import hashlib
import math
import re
from html import escape

from support.files import printable
from support.words import near_duplicates


STYLE = """
:root{--paper:#fff;--ink:#1d2228;--soft:#5a636d;--grid:#e4e7ea;--card:#f6f7f8;--good:#00714f}
@media(prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e6e8ea;--soft:#a3abb3;
--grid:#333a41;--card:#1e2328;--good:#4cc79b}}
:root{color-scheme:light dark}*{box-sizing:border-box}
body{margin:0 auto;max-width:1320px;padding:16px;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2}h2{font-size:1.2rem;margin-top:2.2em}
.question{font-size:1.15rem;max-width:46em}small,.soft{color:var(--soft)}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 8px;text-align:right;border-bottom:1px solid var(--grid);vertical-align:top}
th:first-child,td:first-child{text-align:left;font-weight:600}
.scroll{overflow-x:auto}.scroll th,.scroll td{overflow-wrap:normal}
figure{margin:1em 0;border:1px solid var(--grid);border-radius:8px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr));gap:12px}
.figures figure{margin:0}
svg{display:block;width:100%;height:auto;max-width:860px;margin:auto;fill:var(--ink)}
svg [fill="#fff"]{fill:var(--paper)}svg [stroke="#fff"]{stroke:var(--paper)}
svg [fill="#666"]{fill:var(--soft)}svg [stroke="#666"],svg [stroke="#999"]{stroke:var(--soft)}
svg [stroke="#eee"]{stroke:var(--grid)}
svg [fill="#000000"]{fill:var(--ink)}svg [stroke="#000000"]{stroke:var(--ink)}
.post blockquote{margin:.4em 0 1em;padding:.6em .9em;background:var(--card);border-radius:8px;
font-weight:600}
.sets{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr));gap:12px}
.set{border:1px solid var(--grid);border-radius:8px;padding:8px 12px}
.set h4{margin:0 0 4px}.set ol{margin:0;padding-left:1.5em}.set li{margin:3px 0}
.set li.right::marker{color:var(--good);font-weight:700}
.near{color:var(--soft)}.near bdi{text-decoration:underline dotted}
.tag{font-size:.75rem;white-space:nowrap;color:var(--soft)}.right .tag.ok{color:var(--good)}
nav{display:flex;gap:10px;align-items:center;margin:.6em 0}
button{font:inherit;padding:6px 16px;min-height:40px;border:1px solid var(--soft);
border-radius:8px;background:var(--card);color:var(--ink)}[hidden]{display:none!important}
.narrow{display:none}
@media(max-width:640px){.wide{display:none}.narrow{display:block}
table,tbody,tr,td{display:block}thead{display:none}
tr{border:1px solid var(--grid);border-radius:8px;margin:8px 0;padding:4px 0}
td{display:flex;justify-content:space-between;gap:12px;border:0;padding:2px 10px}
td::before{content:attr(data-name);color:var(--soft);font-weight:400;text-align:left;flex:none}
td:first-child::before{content:none}}
@media print{:root{--paper:#fff;--ink:#000;--soft:#444;--grid:#ccc;--card:#fff;--good:#00714f}
@page{size:A4 landscape;margin:12mm}
body{max-width:none;padding:0;font-size:10pt}nav{display:none}
.post[hidden]{display:block!important}figure,.set,tr{break-inside:avoid}
h2,h4,blockquote{break-after:avoid}h2{margin-top:1.4em}table{font-size:7.5pt}th,td{padding:2px 4px}
.scroll{overflow:visible}.figures,.sets{gap:8px}.figures{grid-template-columns:1fr 1fr}
.sets{grid-template-columns:repeat(4,1fr);font-size:8pt}.post blockquote{margin:.2em 0 .5em}}
"""

SCRIPT = """
const posts=[...document.querySelectorAll('.post')],nav=document.querySelector('nav');let at=0;
function show(i){at=(i+posts.length)%posts.length;posts.forEach((p,n)=>p.hidden=n!==at);
nav.querySelector('span').textContent=`${at+1} of ${posts.length}`}
if(nav&&posts.length){nav.hidden=false;const[back,on]=nav.querySelectorAll('button');
back.onclick=()=>show(at-1);on.onclick=()=>show(at+1);show(0)}
"""

QUESTION = ("Does training that rewards diverse drafts make it likelier that one of the k drafts "
            "shown pleases the user, without making the single draft worse?")


def plain(text):
    """A text for HTML, in content and in quoted attributes: nothing in it is markup."""
    return escape(printable(str(text)), quote=True)


def measured_as(summary):
    """How the completions were sampled and scored: settings that are off or not there are not
    named."""
    settings = []
    for name, value in summary["measured"].items():
        if value is None or value is False or isinstance(value, (dict, list)):
            continue
        settings.append(f"{name} {str(value).removeprefix('torch.')}")
    return f"Measured on {summary['posts']} posts: {', '.join(settings)}"


def html_page(summary, tables, notes, pictures, samples, status=None, refresh=0):
    """The whole page as a text. tables: [(title, header, rows)]; pictures: [(SVG, the same for
    phones), ..], drawn by this program; samples: [{"seed", "post", "sets": {arm: [(completion, is
    it right), ..]}}]; status, refresh: see opening."""
    first, *others = [html_table(*table) for table in tables]
    parts = [*opening(status, refresh), f'<p class="soft">{plain(measured_as(summary))}.</p>',
             first, *figures(pictures), *others, "<h2>Notes</h2><ul>"]
    parts += [f"<li>{plain(note)}</li>" for note in notes]
    parts += ["</ul>", "<h2>The runs</h2><ul>"]
    for arm, entry in summary["arms"].items():
        runs = []
        for run, seed in zip(entry["runs"], entry["seeds"]):
            runs.append(f"{run} (seed {seed})")
        parts.append(f"<li><b><bdi>{plain(arm)}</bdi></b>: <bdi>{plain(', '.join(runs))}</bdi>"
                     "</li>")
    parts += ["</ul>", *samples_part(samples), *CLOSING]
    return "\n".join(parts) + "\n"


def waiting_page(status, notes, pictures, refresh):
    """The page of a study of which no run is measured yet."""
    parts = [*opening(status, refresh), *(f"<p>{plain(note)}</p>" for note in notes),
             *figures(pictures), *CLOSING]
    return "\n".join(parts) + "\n"


CLOSING = [f"</main><script>{SCRIPT}</script></body></html>"]


def opening(status, refresh):
    """The page's beginning. status: a table of runs that are still at work, or None; refresh: the
    seconds after which the browser reads the page again, or 0."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
              "base-uri 'none'; form-action 'none'")
    parts = ['<!DOCTYPE html>', '<html lang="en"><head><meta charset="utf-8">',
             f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
             '<meta name="viewport" content="width=device-width, initial-scale=1">']
    if refresh:
        parts.append(f'<meta http-equiv="refresh" content="{math.ceil(refresh)}">')
    parts += [f"<title>Polychromic LoRA: report</title><style>{STYLE}</style></head><body><main>",
              "<h1>Drafts that differ: the report</h1>", f'<p class="question">{QUESTION}</p>']
    return parts + ([html_table(*status)] if status else [])


def figures(pictures):
    parts = ['<h2>Pictures</h2><div class="figures">']
    for wide, narrow in pictures:
        parts.append(f'<figure><div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
                     "</figure>")
    return [*parts, "</div>"] if pictures else []


def html_table(title, header, rows):
    names = [plain(name) for name in header]
    out = [f'<h2>{plain(title)}</h2><div class="scroll"><table><thead><tr>']
    out += [f'<th scope="col">{name}</th>' for name in names]
    out.append("</tr></thead><tbody>")
    for row in rows:
        cells = []
        for name, word in zip(names, row):
            word = word.replace(" p ", " p\xa0")                               # one line
            cells.append(f'<td data-name="{name}"><bdi>{plain(word)}</bdi></td>')
        out.append("<tr>" + "".join(cells) + "</tr>")
    out.append("</tbody></table></div>")
    return "\n".join(out)


def samples_part(samples):
    """The completions of each run for the same posts, a section a post."""
    if not samples:
        return []
    out = ["<h2>Drafts side by side</h2>",
           '<p class="soft">The first drafts of each run for the first posts by their id, nothing '
           "chosen by hand. &#10003;: right, or passing. &#8776; n: shares nearly all its words "
           "with draft n of the same set.</p>",
           '<nav hidden><button type="button">Back</button><button type="button">Next</button> '
           "<span></span></nav>"]
    for sample in samples:
        out += [f'<section class="post"><small>seed {sample["seed"]}</small>',
                f'<blockquote dir="auto">{plain(sample["post"])}</blockquote><div class="sets">']
        for arm, completions in sample["sets"].items():
            out += sample_set(arm, completions)
        out.append("</div></section>")
    return out


def sample_set(arm, completions):
    """One run's completions of a post: [(text, is it right), ..]."""
    repeats = near_duplicates([text for text, _ in completions])
    out = [f'<div class="set"><h4><bdi>{plain(arm)}</bdi></h4><ol>']
    for (text, good), earlier in zip(completions, repeats):
        out.append(sample_item(text, good, earlier))
    out.append("</ol></div>")
    return out


def sample_item(text, good, earlier):
    """One completion; earlier: the index of the one that it nearly repeats, or None."""
    kinds = []
    tags = ""
    if good:
        kinds.append("right")
        tags += ' <span class="tag ok">&#10003;</span>'
    if earlier is not None:
        kinds.append("near")
        tags += f' <span class="tag">&#8776; {earlier + 1}</span>'
    shown = plain(text) if re.search(r"\S", text) else "<i>(empty)</i>"
    return f'<li class="{" ".join(kinds)}"><bdi dir="auto">{shown}</bdi>{tags}</li>'

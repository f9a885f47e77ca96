"""The report's look: one column on a phone, two on a desk, light or dark as the reader's system is."""

CSS = """
:root {
  color-scheme: light dark;
  --ground: #f4f6f8; --card: #ffffff; --ink: #1c2430; --faint: #5b6675; --line: #dde2e8; --accent: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root { --ground: #12161c; --card: #1b212a; --ink: #e8ecf1; --faint: #a3adba; --line: #333c48; --accent: #56b4e9; }
}
* { box-sizing: border-box; }
body {
  margin: 0; padding: 0 1rem 3rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%;
}
header, main, footer { max-width: 68rem; margin: 0 auto; }
header { padding: 2.2rem 0 0.6rem; border-bottom: 3px solid var(--accent); margin-bottom: 1.4rem; }
h1 { font-size: clamp(1.5rem, 5vw, 2.2rem); line-height: 1.2; margin: 0 0 0.3rem; letter-spacing: -0.01em; }
header p { margin: 0 0 0.4rem; color: var(--faint); }
h2 { font-size: 1.25rem; margin: 2.2rem 0 0.8rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 0.5rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.numbers { display: grid; gap: 0.8rem; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); }
.card, .numbers > div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 0.9rem 1rem; }
.numbers .label { color: var(--faint); font-size: 0.85rem; }
.numbers .value {
  font-size: 1.35rem; font-weight: 650; line-height: 1.35; font-variant-numeric: tabular-nums; overflow-wrap: break-word;
}
.numbers .note { color: var(--faint); font-size: 0.8rem; line-height: 1.35; }
figure { margin: 0; }
figure img { display: block; width: 100%; max-width: 38rem; height: auto; margin: 0 auto; }
figcaption { color: var(--faint); font-size: 0.88rem; margin-top: 0.5rem; }
figcaption b { color: var(--ink); display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { padding: 0.4rem 0.7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--faint); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
tr.first td { font-weight: 650; }
.answer .prompt, .answer .text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.answer .prompt { color: var(--faint); border-left: 3px solid var(--accent); padding-left: 0.7rem; margin-bottom: 0.6rem; }
.answer .facts { color: var(--faint); font-size: 0.82rem; margin: 0.7rem 0 0; font-variant-numeric: tabular-nums; }
.note { color: var(--faint); font-size: 0.88rem; margin: 0.4rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.35rem 1rem; margin: 0; font-size: 0.9rem; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
footer { color: var(--faint); font-size: 0.82rem; margin-top: 2rem; }
@media (max-width: 30rem) {
  body { padding: 0 0.7rem 2rem; }
  .numbers { grid-template-columns: 1fr 1fr; gap: 0.6rem; }
  .numbers .value { font-size: 1.2rem; }
  .card, .numbers > div { padding: 0.75rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 0.5rem; }
}
@media print { body { background: none; } .card, .numbers > div { break-inside: avoid; } }
"""

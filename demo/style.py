"""How the page looks. Nothing is loaded from elsewhere: the fonts are those of the system."""

from __future__ import annotations

#: Browsers then refuse every request to another host, whatever a pipeline's card has in it.
HEAD = (
    '<meta http-equiv="Content-Security-Policy" content="'
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:\">"
)

FONTS = ("ui-sans-serif", "system-ui", "sans-serif")
MONOSPACE = ("ui-monospace", "Consolas", "monospace")

CSS = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto; padding: 0 0 32px !important; }
#new-seed { align-self: end; margin-bottom: 11px; height: 40px; font-weight: 500; }
#download { font-weight: 500; }
.heading h1 { font-size: 1.6rem; font-weight: 650; margin: 20px 0 2px; letter-spacing: -0.01em; }
.heading p { color: var(--body-text-color-subdued); margin: 0 0 4px; }

#generate { display: grid !important; align-items: start; gap: 16px 20px;
    grid-template: "ask result" auto "options result" 1fr / minmax(0, 4fr) minmax(0, 7fr); }
#ask { grid-area: ask; }
#result { grid-area: result; }
#options { grid-area: options; }
#generate > * { min-width: 0 !important; }
@media (max-width: 760px) {
    #generate { grid-template: "ask" auto "result" auto "options" auto / minmax(0, 1fr); }
}

.told { margin: 0 0 8px; font-weight: 500; overflow-wrap: anywhere; }
.told span { font-weight: 400; color: var(--body-text-color-subdued); }
.pictures { display: grid; gap: 10px; }
.pictures figure { margin: 0; min-width: 0; }
.pictures.one { grid-template-columns: minmax(0, 400px); }
.pictures.two { grid-template-columns: repeat(2, minmax(0, 300px)); }
.pictures.many { grid-template-columns: repeat(4, minmax(0, 1fr)); }
.pictures img, .strip img, .cards img {
    width: 100%; height: auto; display: block; border-radius: 6px; border: 1px solid var(--border-color-primary);
    background: var(--background-fill-secondary);
}
img.crisp { image-rendering: pixelated; }

.strip { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); }
.cards { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.strip figure, .cards figure { margin: 0; }
.pictures figcaption, .strip figcaption, .cards figcaption {
    font-size: 0.8rem; color: var(--body-text-color-subdued); margin-top: 4px; line-height: 1.3;
}

.empty {
    display: grid; place-items: center; min-height: 220px; border: 1px dashed var(--border-color-primary);
    border-radius: 8px; color: var(--body-text-color-subdued); padding: 16px; text-align: center;
}
.sentence { margin: 0; padding: 9px 12px; border-radius: 6px; border-left: 3px solid var(--border-color-primary);
    background: var(--background-fill-secondary); overflow-wrap: anywhere; }
.sentence.error { border-left-color: var(--error-border-color); background: var(--error-background-fill);
    color: var(--error-text-color); }

.progress { display: flex; gap: 12px; align-items: center; font-size: 0.88rem; color: var(--body-text-color-subdued); }
.progress progress { flex: 1; height: 6px; appearance: none; border: 0; border-radius: 3px; overflow: hidden;
    background: var(--border-color-primary); }
.progress progress::-webkit-progress-bar { background: var(--border-color-primary); }
.progress progress::-webkit-progress-value { background: var(--primary-600); transition: width 0.3s; }
.progress progress::-moz-progress-bar { background: var(--primary-600); }
.progress progress.busy { background: linear-gradient(90deg, var(--border-color-primary) 35%, var(--primary-600) 50%,
    var(--border-color-primary) 65%) 0 / 300% 100%; animation: busy 1.6s linear infinite; }
.progress progress.busy::-webkit-progress-bar { background: transparent; }
@keyframes busy { from { background-position: 100% 0; } to { background-position: 0 0; } }
@media (prefers-reduced-motion: reduce) { .progress progress.busy { animation: none; } }
.progress span { white-space: nowrap; font-variant-numeric: tabular-nums; }

.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 5px 18px; margin: 0;
    font-size: 0.9rem; }
.facts dt { color: var(--body-text-color-subdued); }
.facts dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
@media (max-width: 520px) {
    .gradio-container > .main { padding: 4px 10px !important; }
    .tab-container button { padding: 0 10px !important; }
    .facts { grid-template-columns: 1fr; gap: 0; }
    .facts dd { margin-bottom: 8px; }
    .strip { grid-template-columns: repeat(auto-fill, minmax(70px, 1fr)); }
    .pictures.many, .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
"""

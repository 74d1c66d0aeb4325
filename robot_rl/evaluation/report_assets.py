"""Style and script of the report page. Kept as text in a module, so that an installed package always has them."""

from __future__ import annotations

CSS = """
:root{--bg:#fdfdfc;--ink:#16181d;--soft:#4a4f5a;--muted:#6b7280;--line:#e4e4e0;--card:#f5f5f2;--policy:#0b62a4;--base:#767b84;
--good:#0b62a4;--bad:#c2450a;--grid:#ececE8;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--bg:#121417;--ink:#eceef1;--soft:#bcc1c9;--muted:#939aa5;--line:#2a2e35;--card:#1a1d22;
--policy:#62b0ee;--base:#9aa1ab;--good:#62b0ee;--bad:#ff9a5c;--grid:#23272d}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 Inter,"Helvetica Neue",system-ui,-apple-system,"Segoe UI",Roboto,
Arial,sans-serif;font-feature-settings:"tnum" 1,"cv05" 1;font-variant-numeric:tabular-nums}
main,footer{max-width:1080px;margin:0 auto;padding:0 28px}
header{padding:56px 0 8px}
.kicker{color:var(--muted);font-size:13px;letter-spacing:.02em;margin:0 0 10px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.018em;font-weight:650;margin:0;max-width:28em;text-wrap:balance;
overflow-wrap:anywhere}
h2{font-size:20px;letter-spacing:-.01em;font-weight:650;margin:0 0 4px}
h3{font-size:14px;font-weight:600;margin:0 0 8px}
p{margin:0 0 12px;max-width:68ch}
.note{color:var(--soft);font-size:15px;margin-bottom:20px}
section{padding:44px 0 0}
.hero{display:flex;align-items:flex-end;gap:28px;margin:30px 0 14px;flex-wrap:wrap}
.rate b{display:block;font-size:92px;line-height:.95;letter-spacing:-.045em;font-weight:680;white-space:nowrap;font-variant-numeric:normal;font-feature-settings:"tnum" 0}
.rate.before b{color:var(--base);font-weight:560}
.rate.after b{color:var(--policy)}
.rate span{display:block;color:var(--muted);font-size:14px;margin-top:12px}
.arrow{width:64px;height:64px;margin-bottom:38px;color:var(--muted);flex:none}
.lead{font-size:18px;line-height:1.5;color:var(--soft);max-width:60ch;margin:20px 0 0}
.lead strong{color:var(--ink);font-weight:600}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:0 32px;margin:34px 0 0;border-top:1px solid var(--line)}
.facts div{padding:14px 0;border-bottom:1px solid var(--line)}
dt,.facts dt{color:var(--muted);font-size:13px}
.facts dd{margin:2px 0 0;font-size:18px;font-weight:600;letter-spacing:-.01em}
.facts small{display:block;font-weight:400;color:var(--soft);font-size:13px;letter-spacing:0;line-height:1.4}
svg.plot{display:block;width:100%;height:auto;overflow:visible}
svg.narrow{display:none}
.grid-2{display:grid;grid-template-columns:1fr 1fr;gap:28px 40px;align-items:start}
.grid-3{display:grid;grid-template-columns:repeat(3,1fr);gap:28px 32px}
figure{margin:0;min-width:0}
figcaption{font-size:14px;color:var(--soft);margin:0 0 8px}
figcaption b{color:var(--ink);font-weight:600}
.plot text{font-family:inherit;fill:var(--ink)}
.plot .tick{font-size:12px;fill:var(--muted)}
.plot .axis-name{font-size:12.5px;fill:var(--soft)}
.plot .label{font-size:13.5px;font-weight:600}
.plot .label.policy{fill:var(--policy)}.plot .label.base{fill:var(--base)}.plot .label.muted{fill:var(--muted);font-weight:500}
.plot .grid{stroke:var(--grid)}.plot .axis{stroke:var(--muted);stroke-opacity:.55}
.plot .line{fill:none;stroke-width:2.4;stroke-linejoin:round;stroke-linecap:round}
.plot .line.policy{stroke:var(--policy)}.plot .line.base{stroke:var(--base);stroke-width:1.8}
.plot .line.latest{stroke:var(--muted);stroke-width:1.4;stroke-dasharray:1.5 4}
.plot .dashed{stroke-dasharray:6 5}.plot .thin{stroke-width:1.7}.plot .faint{stroke-width:1;stroke-opacity:.28}
.plot .band.policy{fill:var(--policy);fill-opacity:.15}.plot .band.base{fill:var(--base);fill-opacity:.15}
.plot .dot.policy{fill:var(--policy);stroke:var(--bg);stroke-width:1.4}
.plot .promotion{stroke:var(--policy);stroke-opacity:.28;stroke-width:1}
.plot .mark.good{fill:var(--good)}.plot .mark.reserve{fill:none;stroke:var(--good);stroke-width:1.5}.plot .mark.bad{fill:var(--bad)}.plot .mark.muted{fill:var(--muted)}
.plot .mark.cross{stroke:var(--muted);stroke-width:1.7;fill:none}
.plot .start.good{fill:var(--good);fill-opacity:.62}.plot .start.bad{stroke:var(--bad);stroke-width:2;fill:none}
.plot .bar.base{fill:var(--base);fill-opacity:.75}.plot .bar.policy{fill:var(--policy)}
.key{display:flex;flex-wrap:wrap;gap:4px 22px;font-size:13.5px;color:var(--soft);margin:10px 0 0;padding:0;list-style:none}
.key li{display:flex;align-items:center;gap:7px}
.key svg{width:15px;height:15px;flex:none;overflow:visible}
.pairs{display:grid;gap:30px 40px}
@media (min-width:900px){.pairs.many{grid-template-columns:1fr 1fr}.pairs.many .pair{gap:12px}}
sup{line-height:0}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:12px 20px}
.pair video{display:block;width:100%;height:auto;border-radius:6px;background:var(--card);border:1px solid var(--line)}
.pair figcaption{margin:8px 0 0}
.ok{color:var(--good);font-weight:600}.fail{color:var(--bad);font-weight:600}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;width:100%}
th{font-weight:500;color:var(--muted);text-align:left;font-size:13px}
th,td{padding:7px 18px 7px 0;border-bottom:1px solid var(--line);white-space:nowrap}
td.n,th.n{text-align:right}
details{border-top:1px solid var(--line);padding:12px 0}
details+details{margin-top:0}
summary{cursor:pointer;font-weight:600;font-size:15px}
summary small{font-weight:400;color:var(--muted);margin-left:10px;font-size:13px}
details>*:not(summary){margin-top:12px}
pre{background:var(--card);padding:16px 18px;border-radius:6px;font:12.5px/1.6 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",
monospace;overflow-x:auto;margin:0}
code{font:0.9em ui-monospace,"SF Mono",Menlo,Consolas,monospace;overflow-wrap:anywhere}
.spec{display:grid;grid-template-columns:minmax(110px,auto) 1fr;gap:4px 24px;font-size:14px;margin:0}
.spec dd{margin:0;overflow-wrap:anywhere}
footer{padding-top:48px;padding-bottom:56px;color:var(--muted);font-size:13px}
#tip{position:fixed;z-index:9;pointer-events:none;background:var(--ink);color:var(--bg);font-size:12.5px;line-height:1.45;padding:6px 10px;
border-radius:5px;max-width:280px;white-space:pre-line;opacity:0}
#tip.on{opacity:1}
[data-tip]{cursor:default}
@media (max-width:720px){
main,footer{padding-left:18px;padding-right:18px}
header{padding-top:32px}h1{font-size:23px}
.hero{gap:6px 18px;margin-top:22px;flex-wrap:nowrap}.rate b{font-size:clamp(34px,12.4vw,68px)}.rate span{font-size:12.5px;line-height:1.4;margin-top:8px}
.arrow{width:30px;height:30px;margin-bottom:48px}
.lead{font-size:16.5px}.facts{grid-template-columns:1fr 1fr;gap:0 18px;margin-top:24px}.facts dd{font-size:16px}
section{padding-top:36px}
.grid-2,.grid-3{grid-template-columns:minmax(0,1fr)}
.pair{gap:8px}.pair figcaption{font-size:12.5px}
svg.wide{display:none}svg.narrow{display:block}}
@media (min-width:721px) and (max-width:980px){.grid-3{grid-template-columns:1fr 1fr}}
@media print{:root{--bg:#fff;--ink:#000;--soft:#333;--muted:#555;--line:#ccc;--card:#f6f6f6;--policy:#0b62a4;--base:#767b84;
--good:#0b62a4;--bad:#b23c05;--grid:#e6e6e6}
body{font-size:11pt;-webkit-print-color-adjust:exact;print-color-adjust:exact}main,footer{max-width:none;padding:0}header{padding-top:0}
section{padding-top:22pt}figure,.pair,tr,.facts div{break-inside:avoid}h2{break-after:avoid}.videos{display:none}
svg.wide{display:block}svg.narrow{display:none}#tip{display:none}}
"""

JS = """
(function(){
  var tip=document.getElementById('tip');
  function show(e){
    var t=e.target.closest&&e.target.closest('[data-tip]');
    if(!t||!t.dataset.tip){tip.classList.remove('on');return}
    tip.textContent=t.dataset.tip;tip.classList.add('on');
    var r=tip.getBoundingClientRect(),x=Math.min(e.clientX+14,innerWidth-r.width-8),y=e.clientY-r.height-12;
    tip.style.left=Math.max(8,x)+'px';tip.style.top=(y<8?e.clientY+18:y)+'px';
  }
  addEventListener('pointermove',show,{passive:true});
  addEventListener('pointerdown',show,{passive:true});
  var videos=[].slice.call(document.querySelectorAll('video'));
  var calm=matchMedia('(prefers-reduced-motion: reduce)').matches;
  videos.forEach(function(v){if(calm){v.autoplay=false;v.pause();v.controls=true}});
  addEventListener('beforeprint',function(){document.querySelectorAll('details').forEach(function(d){d.open=true})});
})();
"""

ARROW = (
    '<svg class="arrow" viewBox="0 0 64 64" fill="none" stroke="currentColor" stroke-width="3.2" stroke-linecap="round" '
    'stroke-linejoin="round" aria-hidden="true"><path d="M6 32h50M40 15l17 17-17 17"/></svg>'
)

"""The template of report.html, as Python because a Flower bundle carries no html. Filled by fedmm.results.report."""

CHANNELS = {
    "adapters": "the shared state down, each client's change of it up",
    "fisher": "how sure a client is of each coordinate of its change",
    "edge": "encoder, connector and token table, once per machine; and the card that names them, every round",
    "features": "what the encoder makes of an image, once a sample and run",
    "steps": "the adapters' part of embeddings, losses and gradients of every training step",
    "answers": "the adapters' part of embeddings and generated tokens of every scored question",
    "control": "Flower's messages: orders and reports",
    "refused": "frames of a kind that the host does not know",
}
"""The ledger's channels in the order of the page, and what each holds."""

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --tint: #e3eef6; --good: #00704f; --bad: #b3382c;
{% for name, both in colours.items() %}--{{ name }}: {{ both[0] }}; {% endfor %} }
@media (prefers-color-scheme: dark) { :root { --page: #12161b; --card: #1a2027; --tint: #1d3547; --good: #4fd0a5;
--bad: #ff9485; {% for name, both in colours.items() %}--{{ name }}: {{ both[1] }}; {% endfor %} } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif; }
main { max-width: 58rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2.1rem; line-height: 1.15; letter-spacing: -0.02em; margin: 0.2rem 0 0.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; letter-spacing: -0.01em; margin: 3.2rem 0 0.6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 0.6rem; }
p { margin: 0.6rem 0; max-width: 46rem; }
code, pre { font: 0.86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 0.7rem 0.9rem;
  margin: 1rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.over, .note, figcaption, dt { color: var(--muted); }
.over { font-size: 0.85rem; letter-spacing: 0.04em; }
.note, figcaption { font-size: 0.9rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); gap: 0.8rem;
  margin: 1.6rem 0 0; }
.fact { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 0.8rem 1rem 0.9rem; }
.fact b { display: block; font-size: 1.45rem; font-weight: 650; letter-spacing: -0.02em; line-height: 1.3; }
.fact span { color: var(--muted); font-size: 0.88rem; line-height: 1.4; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.95rem; }
th, td { padding: 0.42rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--muted); font-weight: 500; font-size: 0.85rem; vertical-align: bottom; }
thead th { white-space: normal; min-width: 4.2rem; }
td:first-child, th:first-child { text-align: left; padding-left: 0.3rem; }
td.words { text-align: left; white-space: normal; min-width: 14rem; color: var(--muted); font-size: 0.88rem; }
tr.main td { font-weight: 650; }
td.share { background: linear-gradient(to right, var(--tint) var(--share), transparent var(--share)); }
figure { margin: 1rem 0 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.narrow { display: none; }
figcaption { margin: 0.5rem 0 1.2rem; max-width: 46rem; }
.bar { display: flex; height: 1.1rem; border-radius: 5px; overflow: hidden; background: var(--line);
  margin: 0.9rem 0 0.4rem; }
.bar i { display: block; min-width: 2px; }
.key { display: inline-block; width: 0.75em; height: 0.75em; border-radius: 2px; margin-right: 0.35em; }
.keys { display: flex; max-width: none; flex-wrap: wrap; gap: 0.1rem 1.4rem; margin-bottom: 1.2rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(15.5rem, 1fr)); gap: 0.8rem; }
.example { display: flex; gap: 0.9rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 0.8rem; }
.example img { width: 6rem; display: block; border-radius: 5px; image-rendering: pixelated; margin-bottom: 0.3rem; }
.example img.large { image-rendering: auto; }
.example > :first-child { flex: none; }
.example div { min-width: 0; font-size: 0.9rem; line-height: 1.4; }
.example q { quotes: none; font-weight: 600; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0.05rem 0.7rem; margin: 0.35rem 0 0; }
dd { margin: 0; overflow-wrap: anywhere; }
.right { color: var(--good); } .wrong { color: var(--bad); }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--muted); }
.environment { font-size: 0.92rem; gap: 0.15rem 1.2rem; }
footer { margin-top: 3.5rem; border-top: 1px solid var(--line); padding-top: 0.8rem; }
@media (max-width: 40rem) { main { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.7rem; }
  .wide { display: none; } .narrow { display: block; } .gallery { grid-template-columns: 1fr; }
  .facts { grid-template-columns: 1fr; gap: 0.6rem; } .fact { padding: 0.6rem 0.75rem; }
  .fact b { font-size: 1.15rem; }
  table { font-size: 0.88rem; } th, td { padding: 0.4rem 0.4rem; } thead th { min-width: 0; }
  td.words:not(.why), th:empty { display: none; } }
@media print { body { background: none; } h2, figure, .example { break-inside: avoid; break-after: avoid; } }
"""

PAGE = (
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ cfg.label }}, seed {{ cfg.seed }} · fedmm</title>
<style>"""
    + STYLE
    + """</style>
</head>
<body>
<main>
{% macro figure(name, caption) %}
<figure>
<div class="wide">{{ figures[name].wide }}</div>
<div class="narrow">{{ figures[name].narrow }}</div>
<figcaption>{{ caption }}</figcaption>
</figure>
{% endmacro %}
{% macro said(answer) %}
<dd class="{{ 'right' if answer.right else 'wrong' }}">{{ answer.said or '(nothing)' }}
{{ '✓' if answer.right else '✗' }}</dd>
{% endmacro %}
{% set names = arms[1:] | map(attribute='label') | list %}

<header>
<div class="over">fedmm · report of a run</div>
<h1>{{ cfg.label }}</h1>
<div>{{ '1 client' if cfg.clients == 1 else cfg.clients ~ ' clients' }},
{{- ' ' ~ cfg.clients_per_round ~ ' a round,' if cfg.clients_per_round }}
{{ '1 round' if cfg.rounds == 1 else cfg.rounds ~ ' rounds' }}, seed {{ cfg.seed }}
{%- if names %}, compared with {{ names | join(', ') }}{% endif %}.
<span class="note">Started {{ environment.started | replace('T', ' ') }}.</span></div>
<pre>{{ command }}</pre>
</header>

{% if not main %}
<p>No arm of this run has finished yet. The page is written again at the end of the run.</p>
{% else %}
<section class="facts">
<div class="fact"><b>{{ main.zero_shot['global'] | percent }} → {{ main.final['global'] | percent }}</b>
<span>global accuracy, before the first round and after the last</span></div>
<div class="fact"><b>{{ main.link | sum | bytes }}</b>
<span>over the link, {{ main.link[0] | bytes }} up and {{ main.link[1] | bytes }} down;
{{ main.control | sum | bytes }} of Flower's messages</span></div>
{% if main.stored and main.stored.less > 0 %}
<div class="fact"><b>{{ main.stored.less | percent }} less</b>
<span>parameters on a client than the whole model has</span></div>
{% endif %}
</section>

<h2>The arms</h2>
<div class="scroll"><table>
<thead><tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table %}
<tr{% if row.cells[0] == cfg.label %} class="main"{% endif %}>
{% for cell in row.cells %}
<td{% if loop.index0 == 1 and row.share is not none %} class="share" style="--share: {{ row.share | percent }}"
{%- endif %}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
<p class="note"><b>One seed is one seed.</b> Every figure here is a single run with seed {{ cfg.seed }}, and two arms a
few points apart may stand the other way round with the next seed.
{% if chance is not none %}
The draw of {{ main.questions.values() | sum }} {{ cfg.evaluate.split }} questions alone moves
an accuracy of {{ main.final['global'] | percent }} by ±{{ (100 * chance) | round(1) }} points (95%).
{% endif %}
Run several seeds and set their folders side by side with <code>fedmm compare</code>: mean and 95% interval.</p>
<p class="note"><i>Global</i> is accuracy on everybody's {{ cfg.evaluate.split }} questions; for personal models, the
mean over clients of each one's accuracy on all of them. <i>Own</i> is each client's accuracy on its own part, averaged
over clients; <i>worst</i> is the lowest of these. A dash was not measured. MB are those
of rounds and scoring on the link; frozen modules (once a machine) and features (once a sample and run, so that of
several arms the first pays) stand below, by channel, as do Flower's messages;
seconds are from an arm's first event to its last.</p>
{% set merged = arms | selectattr('product_error', 'number') | list %}
{% if merged %}
<p class="note">Adapters act through their products <i>B A</i>. A rule that merges <i>A</i> and <i>B</i> apart
misses the mean of the clients' products, here by
{% for arm in merged %}{{ arm.product_error | percent }} ({{ arm.label }}){{ ', ' if not loop.last }}{% endfor +%}
of its size, mean over adapters and rounds.</p>
{% endif %}

<h2>Accuracy by round</h2>
{% set own = arms | rejectattr('curve.everybody') | map(attribute='label') | list %}
{{ figure('accuracy_by_round', 'Accuracy of the state after each round on everybody\\'s ' ~ cfg.evaluate.split
  ~ ' questions; round 0 is before any training.' ~ (' With a star (' ~ own | join(', ')
  ~ '): the mean over the scored clients of accuracy on their own questions, as not every round was scored on all.'
  if own else '')) }}

<h2>Accuracy by client</h2>
{{ figure('accuracy_by_client', main.label ~ ': each client\\'s accuracy on its own ' ~ cfg.evaluate.split
  ~ ' questions, in per cent; the other clients behind it in grey, its start dashed.'
  if main.final.own | length <= panels else main.label ~ ': clients\\' accuracy on their own ' ~ cfg.evaluate.split
  ~ ' questions: median, middle half, full range.') }}
<div class="scroll"><table>
<thead><tr><th>client</th><th>training examples</th><th>{{ cfg.evaluate.split }} questions</th><th>before</th>
{% for arm in arms %}<th>{{ arm.label }}</th>{% endfor %}</tr></thead>
<tbody>
{% for client in range(main.clients) %}
<tr><td>{{ client }}</td><td>{{ main.examples.get(client, dash) }}</td><td>{{ main.questions.get(client, dash) }}</td>
<td>{{ main.zero_shot.own.get(client | string) | percent }}</td>
{% for arm in arms %}<td>{{ arm.final.own.get(client | string) | percent }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>

<h2>What travelled</h2>
{{ figure('bytes_by_channel', main.label ~ ', all rounds and clients together, as counted on the wire. '
  ~ 'Every mark of the axis is a thousand times the one before.') }}
<div class="scroll"><table>
<thead><tr><th>channel</th><th></th>{% for arm in arms %}<th>{{ arm.label }}</th>{% endfor %}</tr></thead>
<tbody>
{% for channel, what in channels.items() if arms | selectattr('bytes.' ~ channel, 'defined') | list %}
<tr><td>{{ channel }}</td><td class="words">{{ what }}</td>
{% for arm in arms %}
<td>{% if channel in arm.bytes %}{{ arm.bytes[channel][0] | bytes }} ↑<br>{{ arm.bytes[channel][1] | bytes }} ↓
{%- else %}{{ dash }}{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>

{% if main.stored and main.stored.less < 0 %}
<h3>What a client stores</h3>
<p class="note">The whole model of {{ main.stored.model | count }} parameters, as llm.where=client asks, and
{{ main.stored.trained | count }} of adapters.</p>
{% elif main.stored %}
{% set stored = main.stored %}
<h3>What a client stores</h3>
<div class="bar" role="img" aria-label="{{ (1 - stored.less) | percent }} of the model's parameters lie on a client">
<i style="width: {{ (stored.frozen / stored.model) | percent(3) }}; background: var(--series-1)"></i>
<i style="width: {{ (stored.trained / stored.model) | percent(3) }}; background: var(--series-2)"></i></div>
<p class="keys">
<span><span class="key" style="background: var(--series-1)"></span>encoder, connector, token table
<b>{{ stored.frozen | count }}</b></span>
<span><span class="key" style="background: var(--series-2)"></span>
{{ 'adapters' if stored.frozen else 'the network, trained whole' }} <b>{{ stored.trained | count }}</b></span>
<span><span class="key" style="background: var(--line)"></span>on the server alone
<b>{{ (stored.model - stored.frozen) | count }}</b></span></p>
<p class="note">Parameters. A client stores {{ (stored.frozen + stored.trained) | count }}, which is
{{ stored.less | percent }} less than the {{ stored.model | count }} of the whole model.
{%- if stored.frozen %} The connector and the token table are in the count.{% endif %}</p>
{% endif %}

{% if arms | selectattr('means.seconds', 'defined') | list %}
<h3>What a round takes at a client</h3>
<div class="scroll"><table>
<thead><tr><th>arm</th><th>seconds in all</th><th>start</th><th>scoring</th><th>training</th><th>Fisher</th>
<th>of it waiting for the link</th><th>peak memory</th></tr></thead>
<tbody>
{% for arm in arms if arm.means.seconds is defined %}
<tr><td>{{ arm.label }}</td>
{% for name in ('seconds', 'start_seconds', 'score_seconds', 'train_seconds', 'fisher_seconds', 'link_seconds') %}
<td>{{ '%.1f' | format(arm.means[name]) }}</td>
{% endfor %}
<td>{{ arm.means.peak_rss_bytes | bytes }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="note">Means over the rounds in which a client trained. Waiting for the link includes the host's own work, the
frozen LLM. Peak memory is of the client's process, which in one-process runs is the server's too.</p>
{% endif %}

{% for arm in arms if arm.stages %}
{% if loop.first %}
<h2>At the server, beside the rounds</h2>
{% endif %}
<p class="note"><b>{{ arm.label }}.</b>
{% if arm.stages.pretrain %}
{% set oracle = arm.stages.pretrain.writer == "oracle" %}
Pretraining: {{ arm.stages.pretrain.texts | count }} texts
{{ "from the data's own answers, which no MLLM wrote: an upper bound" if oracle else "of an MLLM" }},
{{ arm.stages.pretrain.steps | count }} steps,
{{ "%.0f" | format(arm.stages.pretrain.seconds) }} s, {{ arm.stages.pretrain.llm_samples | count }} samples through the
LLM; the encoder has {{ arm.stages.pretrain.parameters | count }} parameters, its teacher
{{ arm.stages.pretrain.teacher_parameters | count }}.
{% endif %}
{% if arm.stages.open_set %}
Alignment: {{ arm.stages.open_set.images }} open images to tune on and {{ arm.stages.open_set.held_out }} to stop by
{%- if arm.stages.open_set.zero_shot is not none %}
 (of the former the MLLM by itself knows {{ arm.stages.open_set.zero_shot | percent }})
{%- endif %}; {{ arm.stages.aligned | length }} times,
{{ "%.0f" | format(arm.stages.seconds) }} s in all; the aggregate was kept as it was {{ arm.stages.kept }} times.
{% endif %}
</p>
{% if arm.stages.aligned %}
<div class="scroll"><table>
<thead><tr><th>after round</th><th>steps</th><th>held-out loss before</th><th>after</th>
<th>accuracy before</th><th>after</th></tr></thead>
<tbody>
{% for row in arm.stages.aligned %}
<tr><td>{{ row.round }}</td><td>{{ row.kept }}</td><td>{{ "%.2f" | format(row.loss_before) }}</td>
<td>{{ "%.2f" | format(row.loss_after) }}</td><td>{{ row.accuracy_before | percent }}</td>
<td>{{ row.accuracy_after | percent }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% endfor %}
{% set ns = namespace(lost=false) %}
{% for arm in arms if arm.lost %}{% set ns.lost = true %}{% endfor %}
{% if ns.lost %}
<h2>Lost clients</h2>
<div class="scroll"><table>
<thead><tr><th>arm</th><th>round</th><th>client</th><th></th></tr></thead>
<tbody>
{% for arm in arms %}
{% for row in arm.lost %}
<tr><td>{{ arm.label }}</td><td>{{ row.round }}</td><td>{{ row.client }}</td>
<td class="words why">{{ row.reason }}</td></tr>
{% endfor %}
{% endfor %}
</tbody></table></div>
<p class="note">A lost client's update is not in that round's average; the round went on without it. Who was lost in the
last scoring is in no figure of the final state.</p>
{% endif %}
{% endif %}

{% if gallery %}
<h2>Some questions, before and after</h2>
<p class="note">{{ gallery | map(attribute='cards') | map('length') | sum }} of the {{ gallery[0].of }}
{{ cfg.evaluate.split }} questions that {{ cfg.label }} answered both before round 1 and after round {{ cfg.rounds }}.
Chosen by rule, not by eye: each outcome has the share of places that it has among all questions (one at least), clients
take turns, and a hash of the seed and the question's name picks among a client's questions.</p>
<div class="bar" aria-hidden="true">
{% for group in gallery if group.count %}
<i style="width: {{ (group.count / group.of) | percent(3) }}; background: var(--{{ group.colour }})"></i>
{% endfor %}
</div>
<p class="keys">{% for group in gallery %}
<span><span class="key" style="background: var(--{{ group.colour }})"></span>{{ group.outcome }}
<b>{{ group.count }}</b> ({{ (group.count / group.of) | percent(0) }})</span>
{% endfor %}</p>
<div class="gallery">
{% for group in gallery %}
{% for card in group.cards %}
<div class="example">
<div>{% for image in card.images %}<img src="{{ image.url }}" alt="the image asked about"
{%- if image.large %} class="large"{% endif %}>{% endfor %}</div>
<div><q>{{ card.question }}</q>
<dl><dt>truth</dt><dd>{{ card.pair.after.truth }}</dd>
<dt>before</dt>{{ said(card.pair.before) }}
<dt>after</dt>{{ said(card.pair.after) }}
<dt>client</dt><dd>{{ card.pair.client }}</dd></dl>
<div class="note"><span class="key" style="background: var(--{{ group.colour }})"></span>{{ group.outcome }}</div></div>
</div>
{% endfor %}
{% endfor %}
</div>
{% endif %}

<h2>Where it ran</h2>
<dl class="environment">
<dt>run</dt><dd><code>{{ environment.run }}</code></dd>
<dt>Python</dt><dd>{{ environment.python }} on {{ environment.machine }}</dd>
<dt>packages</dt><dd>{% for name, version in environment.packages.items() %}
<span style="white-space: nowrap">{{ name }} {{ version }}{{ ', ' if not loop.last }}</span> {% endfor %}</dd>
{% if main %}<dt>final state</dt><dd><code>{{ main.state }}</code></dd>{% endif %}
</dl>
<details><summary>The whole configuration</summary><pre>{{ config }}</pre></details>
<footer class="note">Made from the files of the run's folder alone. The rows behind every figure lie beside this page:
rounds.jsonl, scores.jsonl, predictions.jsonl, ledger.jsonl; for the other arms under arms/.</footer>
</main>
</body>
</html>
"""
)

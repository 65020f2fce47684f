"use strict";
(() => {
  const report = JSON.parse(document.getElementById("report-data").textContent);
  const plots = report.charts.map((_, index) => document.getElementById(`chart-${index}`));
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const kinds = { f4: Float32Array, i4: Int32Array };
  const unpack = ({ dtype, bdata }) => new kinds[dtype](Uint8Array.from(atob(bdata), (c) => c.charCodeAt(0)).buffer);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  let axis = "step";

  // Everything that follows the light or dark scheme, as dotted keys of plotly's layout.
  const colours = () => {
    const found = {
      paper_bgcolor: css("--card"), plot_bgcolor: css("--card"), "font.color": css("--soft"),
      "hoverlabel.bgcolor": css("--card"), "hoverlabel.bordercolor": css("--line"), "hoverlabel.font.color": css("--ink"),
      "modebar.color": css("--soft"), "modebar.activecolor": css("--accent"), "modebar.bgcolor": "rgba(0,0,0,0)",
    };
    for (const name of ["xaxis", "yaxis"]) {
      found[`${name}.gridcolor`] = css("--grid");
      found[`${name}.linecolor`] = css("--line");
      found[`${name}.spikecolor`] = css("--soft");
    }
    return found;
  };
  const assign = (layout, key, value) => {
    const parts = key.split("."), last = parts.pop();
    parts.reduce((table, part) => (table[part] ??= {}), layout)[last] = value;
  };
  // All charts begin and end at the same place, and a double click leads back there.
  const ends = (chart) => {
    const { title, end } = report.axes[axis];
    if (!chart.whole_range) return { "xaxis.title.text": title };
    const first = -0.008 * end, last = 1.008 * end;
    return {
      "xaxis.title.text": title, "xaxis.autorangeoptions.include": [first, last],
      "xaxis.autorangeoptions.clipmin": first, "xaxis.autorangeoptions.clipmax": last,
    };
  };
  // A scale with two sides has the page's own colour in its middle.
  const middle = (scale) => scale.map(([place, colour]) => [place, place === 0.5 ? css("--middle") : colour]);
  const twoSided = (data) => data.flatMap((trace, index) => (Array.isArray(trace.colorscale) ? [index] : []));
  const horizontal = (chart) => chart.axes.map((of) => (of === null ? undefined : unpack(of[axis])));

  const draw = (chart, plot) => {
    const layout = chart.layout;
    layout.font.family = getComputedStyle(document.body).fontFamily;
    for (const [key, value] of Object.entries(colours())) assign(layout, key, value);
    if (chart.switches) for (const [key, value] of Object.entries(ends(chart))) assign(layout, key, value);
    // On a touch screen a finger that moves over a chart scrolls the page.
    if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false;
    for (const index of twoSided(chart.data)) chart.data[index].colorscale = middle(chart.data[index].colorscale);
    horizontal(chart).forEach((x, index) => { if (x !== undefined) chart.data[index].x = x; });
    const removed = ["zoom2d", "pan2d", "select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"];
    return Plotly.newPlot(plot, chart.data, layout, {
      responsive: true, displaylogo: false, modeBarButtonsToRemove: removed, showTips: false,
      showSendToCloud: false, plotlyServerURL: "",  // what is shown here stays here
    });
  };
  const press = (selector, pressed) => {
    for (const button of document.querySelectorAll(selector)) button.setAttribute("aria-pressed", pressed(button));
  };
  const drawn = () => plots.map((plot, index) => [report.charts[index], plot]).filter(([, plot]) => plot._fullLayout);

  const switchAxis = (chosen) => {
    axis = chosen;
    press("[data-axis]", (button) => button.dataset.axis === axis);
    for (const [chart, plot] of drawn()) {
      if (!chart.switches) continue;
      const xs = horizontal(chart), moved = xs.flatMap((x, index) => (x === undefined ? [] : [index]));
      Plotly.update(plot, { x: moved.map((index) => xs[index]) }, { ...ends(chart), "xaxis.autorange": true }, moved);
    }
  };
  const toggleRun = (button) => {
    const run = Number(button.dataset.run), shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", shown);
    for (const [chart, plot] of drawn()) {
      const own = chart.runs.flatMap((of, index) => (of === run ? [index] : []));
      if (own.length) Plotly.restyle(plot, { visible: shown ? true : "legendonly" }, own);
    }
  };
  const recolour = (more = {}) => {
    for (const [chart, plot] of drawn()) {
      Plotly.relayout(plot, { ...colours(), ...more });
      for (const index of twoSided(chart.data)) {
        Plotly.restyle(plot, { colorscale: [middle(chart.data[index].colorscale)] }, [index]);
      }
    }
  };

  for (const button of document.querySelectorAll("[data-axis]")) {
    button.addEventListener("click", () => switchAxis(button.dataset.axis));
  }
  for (const button of document.querySelectorAll("[data-run]")) button.addEventListener("click", () => toggleRun(button));
  dark.addEventListener("change", () => recolour());
  // Paper is white and narrower than most windows.
  matchMedia("print").addEventListener("change", (print) => {
    recolour(print.matches ? { autosize: false, width: 660 } : { autosize: true, width: null });
  });

  (async () => {
    for (let index = 0; index < plots.length; index += 1) {
      await draw(report.charts[index], plots[index]);
      await new Promise((go) => setTimeout(go));  // the page stays responsive meanwhile
    }
    document.documentElement.dataset.charts = "ready";
  })();
})();

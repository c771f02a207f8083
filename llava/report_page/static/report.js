"use strict";
// Draws reports. Whatever comes from images, files and models becomes text (textContent), never HTML.
const Report = (() => {
  const {strings: text, about} = JSON.parse(document.getElementById("data").textContent);
  const HEAT = [[70, 20, 120], [220, 50, 70], [255, 220, 60]];
  const MASK = [255, 220, 60];

  function make(tag, settings = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(settings)) {
      if (name === "class") element.className = value;
      else if (name === "text") element.textContent = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  function verdictOf(result) {
    if (result.error) return {kind: "none", word: text.failed, why: result.error.message};
    const report = result.report;
    if (report.abstained) return {kind: "none", word: text.verdict_none, why: report.abstained_because || text.declines};
    if (report.label === "real" || report.label === "fake")
      return {kind: report.label, word: text[`verdict_${report.label}`], why: ""};
    return {kind: "none", word: text.verdict_none, why: report.text ? text.no_words : text.no_answer};
  }

  // P(fake) as it is shown: calibrated where that can be.
  function scoreOf(result) {
    if (result.error || result.report.fake_probability === null) return null;
    return result.calibrated_probability ?? result.report.fake_probability;
  }

  function shown(score) {
    if (score === null) return "–";
    // Rounded to three digits, a score that is nearly sure would look like certainty.
    if (score > 0.999) return "> 0.999";
    return score < 0.001 ? "< 0.001" : score.toFixed(3);
  }

  function gauge(result) {
    const score = scoreOf(result);
    if (score === null) return result.report.abstained ? null : make("p", {class: "soft", text: text.gauge_none});
    const how = result.calibrated_probability === null ? text.gauge_raw : text.gauge_calibrated;
    const marker = make("i");
    marker.style.left = `${(100 * score).toFixed(1)}%`;
    const track = make("div", {
      class: "track", role: "meter", "aria-label": text.gauge, "aria-valuemin": "0", "aria-valuemax": "1",
      "aria-valuenow": score.toFixed(3), "aria-valuetext": `${shown(score)}, ${how}`,
    }, marker);
    const ends = make("div", {class: "ends", "aria-hidden": "true"},
      make("span", {text: text.real_end}), make("span", {text: text.fake_end}));
    return make("div", {class: "gauge"}, track, ends,
      make("p", {}, make("b", {text: `P(fake) ${shown(score)}`}), make("span", {class: "soft", text: ` ${how}`})));
  }

  // Grey values become colours: a heat map, or one colour where a mask is white.
  function paint(canvas, source, isMask) {
    const image = new Image();
    image.onload = () => {
      canvas.width = image.naturalWidth;
      canvas.height = image.naturalHeight;
      const context = canvas.getContext("2d");
      context.drawImage(image, 0, 0);
      const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
      for (let at = 0; at < pixels.data.length; at += 4) {
        const value = pixels.data[at] / 255;
        const between = value * (HEAT.length - 1);
        const low = Math.min(Math.floor(between), HEAT.length - 2);
        for (let channel = 0; channel < 3; channel += 1) {
          const heat = HEAT[low][channel] + (between - low) * (HEAT[low + 1][channel] - HEAT[low][channel]);
          pixels.data[at + channel] = isMask ? MASK[channel] : heat;
        }
        pixels.data[at + 3] = 255 * value;
      }
      context.putImageData(pixels, 0, 0);
      canvas.dataset.painted = "yes";
    };
    image.src = source;
  }

  function marked(share) {
    if (share === 0) return text.nothing_marked;
    const percent = share < 0.001 ? "< 0.1" : (100 * share).toFixed(1);
    return `${text.overlay_mask}: ${percent} % ${text.of_the_image}`;
  }

  function picture(result) {
    if (!result.preview) return null;
    const layers = make("div", {class: "layers"}, make("img", {src: result.preview, alt: text.image}));
    const figure = make("figure", {}, layers);
    const overlays = ["mask", "attention"].filter((name) => result[name]);
    if (!overlays.length) return figure;
    const canvas = make("canvas", {"aria-hidden": "true"});
    layers.append(canvas);
    const slider = make("input", {type: "range", min: "0", max: "100", value: "60"});
    const strength = () => { canvas.style.opacity = slider.value / 100; };
    slider.addEventListener("input", strength);
    strength();
    const caption = make("figcaption");
    const choose = (name) => {
      paint(canvas, result[name], name === "mask");
      caption.textContent = name === "mask" ? marked(result.marked) : text[`overlay_${name}`];
    };
    choose(overlays[0]);
    const row = make("div", {class: "slider"}, make("label", {}, `${text.overlay_slider} `, slider));
    if (overlays.length > 1) {
      const options = overlays.map((name) => make("option", {value: name, text: text[`overlay_${name}`]}));
      const choice = make("select", {"aria-label": text.overlay_choice}, ...options);
      choice.addEventListener("change", () => choose(choice.value));
      row.prepend(choice);
    }
    figure.append(caption, row);
    return figure;
  }

  function reasons(report, constant) {
    const stages = Object.entries(report.stages).filter(([name, words]) => words && !constant.includes(name));
    const body = make("div", {}, make("h4", {text: text.reasons}));
    if (stages.length) {
      const list = make("dl");
      for (const [name, words] of stages) list.append(make("dt", {text: name.toLowerCase()}), make("dd", {text: words}));
      body.append(list);
      body.append(make("details", {}, make("summary", {text: text.whole_answer}), make("pre", {text: report.text})));
    } else {
      body.append(make("p", {class: report.text ? "" : "soft", text: report.text || text.no_reasons}));
    }
    return body;
  }

  function strip(rows) {
    const list = make("ul", {class: "strip"});
    for (const row of rows) {
      const word = row.holds ? text.holds : text.changes;
      const score = row.fake_probability === null ? "" : ` (P(fake) ${shown(row.fake_probability)})`;
      list.append(make("li", {class: row.holds ? "holds" : "changes",
        text: `${text[`step_${row.step}`] || row.step}: ${word}${score}`}));
    }
    return list;
  }

  // `check`, where there is somebody to ask, returns a promise of the rows.
  function stability(result, check, atOnce) {
    if (!result.stability && !check) return null;
    const place = make("div", {class: "holds-part"}, make("h4", {text: text.stability}));
    if (result.stability) {
      place.append(strip(result.stability));
      return place;
    }
    const run = async () => {
      const waiting = make("p", {class: "soft", text: text.stability_wait});
      place.lastChild.replaceWith(waiting);
      try {
        result.stability = await check();
        waiting.replaceWith(strip(result.stability));
      } catch (error) {
        waiting.textContent = error.message;
      }
    };
    place.append(make("button", {type: "button", text: text.stability_check, onclick: run}));
    if (atOnce) run();
    return place;
  }

  function provenance(result) {
    return make("div", {class: "provenance"}, make("h4", {text: text.provenance}),
      make("p", {text: result.provenance.line}), make("p", {class: "soft", text: text.provenance_note}));
  }

  function card(result, {check = null, atOnce = false} = {}) {
    const verdict = verdictOf(result);
    const heading = make("p", {class: `verdict ${verdict.kind}`}, verdict.word,
      verdict.why ? make("span", {class: "why", text: `: ${verdict.why}`}) : null);
    const article = make("article", {class: "card", "aria-label": `${text.report_of} ${result.name}`},
      make("h3", {text: result.name}), heading);
    if (result.error) return article;
    const report = result.report;
    const notes = [[report.agrees === false, text.disagree], [report.off_distribution, text.off_distribution],
      [report.tag, `${text.kind}: ${report.tag}`]];
    const said = make("div", {}, gauge(result),
      ...notes.filter(([is]) => is).map(([, words]) => make("p", {class: "soft", text: words})),
      report.abstained || !(report.text || report.label) ? null : reasons(report, result.constant_stages));
    const image = picture(result);
    article.append(make("div", {class: image ? "columns pictured" : "columns"}, image, said));
    article.append(stability(result, check, atOnce) ?? "", provenance(result));
    return article;
  }

  // --- several images

  function originOf(result) {
    const traces = result.error ? [] : result.provenance.traces;
    const order = ["generated", "edited", "camera", "unknown"];
    const strongest = order.find((origin) => traces.some((trace) => trace.origin === origin));
    return text[`origin_${strongest || "none"}`];
  }

  const COLUMNS = [
    ["column_image", (result) => result.name],
    ["column_verdict", (result) => verdictOf(result).word],
    ["column_score", (result) => scoreOf(result)],
    ["column_provenance", originOf],
  ];

  function compare(one, other) {
    if (one === null || other === null) return (one === null) - (other === null);
    return typeof one === "number" ? one - other : String(one).localeCompare(String(other));
  }

  // Returns the table; `open` is called with a result whose report is to be shown.
  function table(results, open) {
    const head = make("tr");
    const body = make("tbody");
    let sorted = null;
    const fill = () => {
      const rows = [...results];
      if (sorted) rows.sort((a, b) => (sorted.down ? -1 : 1) * compare(COLUMNS[sorted.at][1](a), COLUMNS[sorted.at][1](b)));
      body.replaceChildren(...rows.map((result) => {
        const name = make("button", {type: "button", text: result.name, "aria-label": `${text.open} ${result.name}`});
        const verdict = verdictOf(result);
        const row = make("tr", {},
          make("td", {}, result.preview ? make("img", {src: result.preview, alt: ""}) : ""), make("td", {}, name),
          make("td", {class: verdict.kind, text: verdict.word}), make("td", {text: shown(scoreOf(result))}),
          make("td", {text: originOf(result)}));
        name.addEventListener("click", () => {
          for (const other of body.children) other.classList.remove("open");
          row.classList.add("open");
          open(result);
        });
        return row;
      }));
    };
    head.append(make("td"));
    COLUMNS.forEach(([name], at) => {
      const cell = make("th", {scope: "col", "aria-sort": "none"});
      cell.append(make("button", {type: "button", text: text[name], onclick: () => {
        sorted = {at, down: sorted !== null && sorted.at === at && !sorted.down};
        for (const other of head.querySelectorAll("th")) other.setAttribute("aria-sort", "none");
        cell.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
        fill();
      }}));
      head.append(cell);
    });
    fill();
    const scroll = make("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": text.table},
      make("table", {}, make("thead", {}, head), body));
    return {element: scroll, fill};
  }

  // --- saving

  // A spreadsheet would take a text that begins like this for a formula.
  function cell(value) {
    const plain = value === null || value === undefined ? "" : String(value);
    const safe = /^[=+\-@\t\r]/.test(plain) && !Number.isFinite(Number(plain)) ? `'${plain}` : plain;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  }

  function csv(results) {
    const rows = [["image", "verdict", "fake_probability", "calibrated_probability", "abstained_because", "provenance", "error"]];
    for (const result of results) {
      const report = result.report || {};
      rows.push([result.name, report.label, report.fake_probability, result.calibrated_probability,
        report.abstained_because, result.provenance?.line, result.error?.message]);
    }
    return rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
  }

  function save(name, kind, content) {
    const link = make("a", {href: URL.createObjectURL(new Blob([content], {type: kind})), download: name});
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function saving(results) {
    const plain = () => results.map(({preview, attention, mask, ...rest}) => rest);
    const buttons = [
      [text.save_csv, () => save("reports.csv", "text/csv", csv(results))],
      [text.save_json, () => save("reports.json", "application/json", JSON.stringify({...about, results: plain()}, null, 1))],
      [text.print, () => window.print()],
    ];
    return make("p", {class: "save"}, text.save,
      ...buttons.map(([label, onclick]) => make("button", {type: "button", text: label, onclick})));
  }

  return {text, about, make, card, table, saving, verdictOf, scoreOf, csv};
})();

"use strict";
// The page: takes images, follows the answers, keeps a history in this browser.
(() => {
  const {text, about, make} = Report;
  const byId = (id) => document.getElementById(id);
  const output = byId("output");
  const status = byId("status");
  let running = null;

  // --- asking the server

  function headers() {
    const key = byId("key");
    return key && key.value ? {Authorization: `Bearer ${key.value}`} : {};
  }

  async function post(path, fields, signal) {
    const body = new FormData();
    for (const [name, value] of fields) body.append(name, value);
    let response;
    try {
      response = await fetch(path, {method: "POST", body, headers: headers(), signal});
    } catch (error) {
      throw error.name === "AbortError" ? error : new Error(text.no_connection);
    }
    if (response.ok) return response;
    const found = await response.json().catch(() => null);
    throw new Error(found?.error?.message || `${response.status}`);
  }

  // Yields each event of a stream as [name, data].
  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const {value, done} = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new Error(text.interrupted);
      });
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const name = /^event: (.*)$/m.exec(part);
        const data = /^data: (.*)$/m.exec(part);
        if (data) yield [name ? name[1] : "", JSON.parse(data[1])];
      }
    }
  }

  async function checkStability(file) {
    const response = await post("/v1/stability", [["image", file]]);
    return (await response.json()).steps;
  }

  // Analyses some files; `heard` takes pieces of answers, `found` each result with its number.
  async function analyze(files, signal, heard, found) {
    const wanted = [["attention", String(about.attention)], ["mask", "true"], ["preview", "true"], ["stream", "true"]];
    const response = await post("/v1/analyze", [...files.map((file) => ["image", file]), ...wanted], signal);
    const missing = new Set(files.keys());
    for await (const [name, data] of events(response)) {
      if (name === "text") heard(data.index, data.text);
      else if (name === "result") { missing.delete(data.index); found(data.index, data); }
      else if (name === "error") throw new Error(data.error.message);
    }
    if (missing.size) throw new Error(text.interrupted);
  }

  // --- a run over some files

  function failed(file, message) {
    return {name: file.name, error: {message}};
  }

  function tooLarge(file) {
    return file.size > about.upload_mb * 1e6 ? failed(file, `${file.name} ${text.too_large} (${about.upload_mb} MB)`) : null;
  }

  // Parts of at most as many images, and as many bytes, as the server takes.
  function* parts(numbered) {
    let part = [];
    let bytes = 0;
    for (const entry of numbered) {
      if (part.length && (part.length === about.max_images || bytes + entry.file.size > 0.9 * about.upload_mb * 1e6)) {
        yield part;
        part = [];
        bytes = 0;
      }
      part.push(entry);
      bytes += entry.file.size;
    }
    if (part.length) yield part;
  }

  async function run(files) {
    if (!files.length) return;
    running?.abort();
    const own = new AbortController();
    running = own;
    const results = files.map(tooLarge);
    const isOne = files.length === 1;
    const stream = byId("stream");
    stream.textContent = isOne && !about.streams ? text.whole_at_end : "";
    const progress = () => {
      const done = results.filter(Boolean).length;
      byId("progress").textContent = isOne ? `${text.working} ${files[0].name} …` : `${text.working} ${done} / ${files.length} …`;
    };
    progress();
    byId("work").hidden = false;
    status.textContent = "";
    output.replaceChildren();
    byId("results").scrollIntoView({block: "start"});
    const view = isOne ? null : overview(results, files);
    const taken = (number, result) => {
      results[number] = result;
      progress();
      if (view) view();
      remember(result);
    };
    const open = files.map((file, number) => ({file, number})).filter(({number}) => !results[number]);
    for (const part of parts(open)) {
      try {
        await analyze(part.map(({file}) => file), own.signal,
          (index, piece) => { if (isOne) { stream.append(piece); stream.scrollTop = stream.scrollHeight; } },
          (index, result) => taken(part[index].number, result));
      } catch (error) {
        if (running !== own) return;
        const why = error.name === "AbortError" ? text.cancelled : error.message;
        for (const {file, number} of part) if (!results[number]) taken(number, failed(file, why));
        if (own.signal.aborted) break;
      }
    }
    files.forEach((file, number) => { if (!results[number]) taken(number, failed(file, text.cancelled)); });
    byId("work").hidden = true;
    if (isOne) showOne(results[0], files[0]);
    else view();
    running = null;
  }

  function showOne(result, file) {
    const check = !file || result.error ? null : () => checkStability(file);
    const card = Report.card(result, {check, atOnce: true});
    output.replaceChildren(...(result.error ? [] : [Report.saving([result])]), card);
    const verdict = Report.verdictOf(result);
    status.textContent = `${result.name}: ${verdict.word}${verdict.why ? `: ${verdict.why}` : ""}`;
  }

  // Shows a table that grows, and below it the report that is chosen.
  function overview(results, files) {
    const there = [];
    const chosen = make("div");
    const {element, fill} = Report.table(there, (result) => {
      const file = files[results.indexOf(result)];
      chosen.replaceChildren(Report.card(result, {check: result.error ? null : () => checkStability(file)}));
      chosen.scrollIntoView({block: "nearest"});
    });
    output.replaceChildren(Report.saving(there), element, chosen);
    return () => {
      there.splice(0, there.length, ...results.filter(Boolean));
      fill();
      if (there.length === files.length) status.textContent = `${files.length} / ${files.length}`;
    };
  }

  // --- ways in

  const take = (list) => run([...list].filter((file) => file instanceof File));
  const drop = byId("drop");
  byId("choose").addEventListener("click", () => byId("files").click());
  for (const id of ["files", "capture"])
    byId(id).addEventListener("change", (event) => { take(event.target.files); event.target.value = ""; });
  for (const name of ["dragover", "dragleave", "drop"])
    document.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      if (name === "drop") take(event.dataTransfer.files);
    });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) { event.preventDefault(); take(event.clipboardData.files); }
  });
  byId("examples").addEventListener("click", async (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    try {
      const response = await fetch(`/samples/${encodeURIComponent(button.dataset.sample)}`);
      run([new File([await response.blob()], button.dataset.sample)]);
    } catch {
      status.textContent = text.no_connection;
    }
  });
  byId("cancel").addEventListener("click", () => running?.abort());

  // --- the camera: of this machine, or the telephone's own

  const camera = byId("camera");
  byId("photograph").addEventListener("click", async () => {
    if (!navigator.mediaDevices?.getUserMedia || matchMedia("(pointer: coarse)").matches) {
      byId("capture").click();
      return;
    }
    try {
      byId("video").srcObject = await navigator.mediaDevices.getUserMedia({video: {facingMode: "environment"}});
      camera.showModal();
    } catch (error) {
      status.textContent = `${text.camera_failed}: ${error.message}`;
    }
  });
  camera.addEventListener("close", () => {
    for (const track of byId("video").srcObject?.getTracks() || []) track.stop();
  });
  byId("leave").addEventListener("click", () => camera.close());
  byId("take").addEventListener("click", () => {
    const video = byId("video");
    const canvas = make("canvas", {width: video.videoWidth, height: video.videoHeight});
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => {
      camera.close();
      if (blob) run([new File([blob], "photograph.png", {type: "image/png"})]);
    }, "image/png");
  });

  // --- history, in this browser only

  const KEPT = 40;
  const store = new Promise((resolve) => {
    const opening = indexedDB.open("forgery", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("results", {autoIncrement: true});
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => resolve(null); // the page works without a history, for example in a private window
  });

  async function history(mode, work) {
    const database = await store;
    if (!database) return null;
    return new Promise((resolve) => {
      const transaction = database.transaction("results", mode);
      const request = work(transaction.objectStore("results"));
      transaction.oncomplete = () => resolve(request?.result ?? null);
      transaction.onerror = () => resolve(null);
    });
  }

  async function remember(result) {
    if (result.error) return;
    await history("readwrite", (results) => {
      results.add({...result, when: new Date().toISOString()});
      const counting = results.getAllKeys();
      counting.onsuccess = () => counting.result.slice(0, -KEPT).forEach((key) => results.delete(key));
      return null;
    });
    showHistory();
  }

  async function showHistory() {
    const results = ((await history("readonly", (kept) => kept.getAll())) || []).reverse();
    byId("clear").hidden = !results.length;
    byId("history").replaceChildren(...(results.length ? results.map((result) => {
      const verdict = Report.verdictOf(result);
      const when = new Date(result.when).toLocaleString();
      return make("li", {}, make("button", {type: "button", onclick: () => { running?.abort(); showOne(result, null); byId("results").focus(); }},
        result.preview ? make("img", {src: result.preview, alt: ""}) : null,
        make("span", {}, `${result.name} `, make("b", {class: verdict.kind, text: verdict.word}), ` ${when}`)));
    }) : [make("li", {class: "soft", text: text.history_empty})]));
  }

  byId("clear").addEventListener("click", async () => {
    await history("readwrite", (results) => results.clear());
    showHistory();
  });
  showHistory();
})();

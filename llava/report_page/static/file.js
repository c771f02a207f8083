"use strict";
// Shows the results that lie in the file itself: one report, or a table and all reports below it.
(() => {
  const {results} = JSON.parse(document.getElementById("data").textContent);
  const output = document.getElementById("output");
  const cards = results.map((result) => Report.card(result));
  const parts = [Report.saving(results)];
  if (results.length > 1) {
    const overview = Report.table(results, (result) => {
      const card = cards[results.indexOf(result)];
      card.scrollIntoView();
    });
    parts.push(overview.element);
  }
  output.replaceChildren(...parts, ...cards);
})();

// Order of search results: the guide first, then the API, then measurements. The numbers are Sphinx's own, but for `score`.
var Scorer = {
  score: ([docname, title, anchor, descr, score]) => {
    if (docname.startsWith("benchmarks/") || docname === "changelog") return score - 6;
    if (docname === "api") return score - 4;
    if (docname.startsWith("notebooks/")) return score - 2;
    // Its headings are symptoms: among equals, it comes first.
    return docname === "guide/troubleshooting" ? score + 1 : score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};

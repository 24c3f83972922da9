"use strict";
// What the pages share. All text comes in as text: nothing is ever parsed as HTML.
const MOST_WORDS = 400;

function element(tag, classes, ...children) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  made.append(...children.filter((child) => child !== null));
  return made;
}

// Which words of either text the other lacks: longest common subsequence, within bounds.
function differences(one, other) {
  const a = one.split(/(\s+)/), b = other.split(/(\s+)/);
  let start = 0, end = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const n = a.length - end - start, m = b.length - end - start;
  const keptA = new Set(), keptB = new Set();
  if (n <= MOST_WORDS && m <= MOST_WORDS) {
    const width = m + 1, best = new Uint16Array((n + 1) * width);
    for (let i = n - 1; i >= 0; i--)
      for (let j = m - 1; j >= 0; j--)
        best[i * width + j] = a[start + i] === b[start + j]
          ? best[(i + 1) * width + j + 1] + 1
          : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
    for (let i = 0, j = 0; i < n && j < m; ) {
      if (a[start + i] === b[start + j]) { keptA.add(start + i++); keptB.add(start + j++); }
      else if (best[(i + 1) * width + j] >= best[i * width + j + 1]) i++;
      else j++;
    }
  }
  const marked = (words, kept) => {
    const parts = [];  // [is changed, text], neighbors joined
    words.forEach((word, i) => {
      const changed = i >= start && i < words.length - end && !kept.has(i);
      if (parts.length && parts[parts.length - 1][0] === changed) parts[parts.length - 1][1] += word;
      else parts.push([changed, word]);
    });
    return parts;
  };
  return [marked(a, keptA), marked(b, keptB)];
}

// Puts marked parts into a box.
function showParts(box, parts) {
  for (const [changed, text] of parts)
    if (text) box.append(changed && text.trim() ? element("mark", "", text) : text);
}


/** Tables in text: values with separators (RFC 4180, or tabs). */

/**
 * Parse the first rows of a table.
 * @param {string} text
 * @param {string} separator
 * @param {number} limit of rows
 * @returns {{ rows: string[][], isMore: boolean }}
 */
export function parseTable(text, separator, limit) {
  /** @type {string[][]} */
  const rows = [];
  /** @type {string[]} */
  let row = [];
  let at = 0;
  while (at < text.length && rows.length < limit) {
    let value = '';
    if (text[at] === '"') {
      const [inside, after] = quotedValue(text, at + 1);
      value = inside;
      at = after;
    }
    const end = endOf(text, at, separator);
    value += text.slice(at, end).replace(/\r$/, '');
    row.push(value);
    at = end + 1;
    if (end >= text.length || text[end] === '\n') {
      rows.push(row);
      row = [];
    }
  }
  return { rows, isMore: at < text.length };
}

/**
 * @param {string} text
 * @param {number} start
 * @returns {[string, number]} what stands in the quotes, and where it goes on
 */
function quotedValue(text, start) {
  let value = '';
  let at = start;
  for (;;) {
    const end = text.indexOf('"', at);
    if (end < 0) return [value + text.slice(at), text.length];
    value += text.slice(at, end);
    if (text[end + 1] !== '"') return [value, end + 1];
    value += '"';
    at = end + 2;
  }
}

/**
 * @param {string} text
 * @param {number} start
 * @param {string} separator
 */
function endOf(text, start, separator) {
  let end = start;
  while (end < text.length && text[end] !== separator && text[end] !== '\n') end += 1;
  return end;
}

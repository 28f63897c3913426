/** Files that were dropped or chosen, with their places in the directories they came from. */

const MAX_FILES = 10_000;

/** @typedef {{ path: string, file: File }} Chosen */

/**
 * Return all files of a drop, directories walked through. The walk begins before anything is
 * awaited: the browser takes the list away after that.
 * @param {DataTransfer} transfer
 * @returns {Promise<Chosen[]>}
 */
export async function filesOf(transfer) {
  const entries = [...transfer.items].flatMap((item) => {
    const entry = item.kind === 'file' ? item.webkitGetAsEntry() : null;
    return entry === null ? [] : [entry];
  });
  if (entries.length === 0) return [...transfer.files].map((file) => ({ path: file.name, file }));
  /** @type {Chosen[]} */
  const found = [];
  // of one directory alone the content is meant: run.sh is to stand at the top
  const [only] = entries;
  const isOne = entries.length === 1 && only.isDirectory;
  for (const entry of isOne ? await list(/** @type {FileSystemDirectoryEntry} */ (only)) : entries) {
    await walk(entry, '', found);
  }
  return found;
}

/**
 * Return files from an input, also of one that takes a directory.
 * @param {FileList} files
 * @returns {Chosen[]}
 */
export function filesOfInput(files) {
  return [...files].map((file) => ({
    path: file.webkitRelativePath ? file.webkitRelativePath.split('/').slice(1).join('/') : file.name,
    file,
  }));
}

/**
 * @param {FileSystemEntry} entry
 * @param {string} before
 * @param {Chosen[]} found
 */
async function walk(entry, before, found) {
  if (found.length >= MAX_FILES) return;
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => {
      /** @type {FileSystemFileEntry} */ (entry).file(resolve, reject);
    });
    found.push({ path: before + entry.name, file });
    return;
  }
  for (const inner of await list(/** @type {FileSystemDirectoryEntry} */ (entry))) {
    await walk(inner, `${before}${entry.name}/`, found);
  }
}

/**
 * @param {FileSystemDirectoryEntry} directory
 * @returns {Promise<FileSystemEntry[]>}
 */
async function list(directory) {
  const reader = directory.createReader();
  /** @type {FileSystemEntry[]} */
  const all = [];
  for (;;) {
    // a reader gives some at a time, and none when it is through
    const some = /** @type {FileSystemEntry[]} */ (await new Promise((resolve, reject) => {
      reader.readEntries(resolve, reject);
    }));
    if (some.length === 0) return all;
    all.push(...some);
  }
}

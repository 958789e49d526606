// Files that were dropped, kept by the browser over a reload.

const DATABASE = "opensora";
const STORE = "given";

function open() {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open(DATABASE, 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(STORE);
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
  });
}

async function ask(mode, what) {
  const database = await open();
  try {
    return await new Promise((resolve, reject) => {
      const asked = what(database.transaction(STORE, mode).objectStore(STORE));
      asked.onsuccess = () => resolve(asked.result);
      asked.onerror = () => reject(asked.error);
    });
  } finally {
    database.close();
  }
}

// Keeps plain data with files in it; a browser that may keep nothing, as in private windows, does without.
export const keep = (given) => ask("readwrite", (store) => store.put(given, STORE)).catch(() => {});

// What was kept last.
export const kept = () => ask("readonly", (store) => store.get(STORE)).then((given) => given ?? [], () => []);

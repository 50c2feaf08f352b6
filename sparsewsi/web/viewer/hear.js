// No answer unheard. Gradio's client opens a stream of answers unless it believes that one is open, and learns of a
// stream's end after the server: what is asked for in between would be answered to nobody until something else is
// asked. So what the queue replies waits until the client knows the ends that the server had counted by then (door.py).
"use strict";

(() => {
  const PATIENCE = 2000; // ms; an end that came otherwise is not waited for twice
  const ask = window.fetch;
  const known = new EventTarget();
  let ends = 0;

  function end() {
    ends += 1;
    known.dispatchEvent(new Event("end"));
  }

  async function hear(count) {
    const until = performance.now() + PATIENCE;
    while (ends < count && performance.now() < until) {
      await new Promise((go) => {
        known.addEventListener("end", go, { once: true });
        setTimeout(go, until - performance.now());
      });
    }
    ends = Math.max(ends, count);
  }

  window.fetch = async (asked, given) => {
    const url = asked instanceof Request ? asked.url : String(asked);
    if (/\/queue\/data\?/.test(url)) (asked.signal ?? given?.signal)?.addEventListener("abort", end, { once: true });
    const reply = await ask(asked, given);
    if (/\/queue\/join\b/.test(url)) await hear(Number(reply.headers.get("x-sparsewsi-streams") ?? 0));
    return reply;
  };
})();

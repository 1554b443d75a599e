// Reads the XCom of a task's run through Airflow's own REST API, with the user's own session, and shows its chart.
// Texts are set as text and the chart as an image, so nothing of what a run sends can run here.
"use strict";

async function show() {
  const query = new URLSearchParams(location.search);
  const part = (name) => encodeURIComponent(query.get(name) ?? "");
  const index = /^\d+$/.test(query.get("map_index") ?? "") ? query.get("map_index") : "-1";
  const task = `dags/${part("dag_id")}/dagRuns/${part("run_id")}/taskInstances/${part("task_id")}`;
  const entry = `../api/v2/${task}/xcomEntries/dstack_utilization?map_index=${index}`;
  const reply = await fetch(entry, { credentials: "same-origin", headers: { Accept: "application/json" } });
  if (reply.status === 404) {
    return say("No values. They are here once the dstack run of this task has ended, if it ran for 20 seconds or more.");
  }
  if (!reply.ok) {
    return say(`Airflow did not return the XCom dstack_utilization (status ${reply.status}).`);
  }
  const { value } = await reply.json();
  const body = typeof value === "string" ? value : JSON.stringify(value);
  const drawn = await fetch("chart", { method: "POST", headers: { "Content-Type": "application/json" }, body });
  if (!drawn.ok) {
    return say("The XCom dstack_utilization is not one that this version can show.");
  }
  const { text, advice, svg } = await drawn.json();
  say(text);
  document.getElementById("advice").textContent = advice;
  const chart = document.getElementById("chart");
  chart.src = URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" }));
  chart.hidden = false;
}

function say(text) {
  document.getElementById("text").textContent = text;
}

show().catch((error) => say(`Could not show the utilization: ${error.message}`));

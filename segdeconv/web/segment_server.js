// Labels from the server that sent this page.

export async function segment(file) {
  const response = await fetch("predict?output=labels", {
    method: "POST",
    headers: { "Content-Type": file.type || "application/octet-stream" },
    body: file,
  }).catch(() => { throw new Error("the server does not answer"); });
  if (!response.ok) {
    const answer = await response.json().catch(() => ({ detail: response.statusText }));
    throw new Error(answer.detail);
  }
  return { overlay: await response.blob(), pixels: JSON.parse(response.headers.get("Class-Pixels")) };
}

// The documentation, drawn from the description that the server gives of itself.

const made = (tag, text = "", className = "") =>
  Object.assign(document.createElement(tag), { textContent: text, className });

function table(rows) {
  const body = made("table");
  for (const cells of rows) {
    const row = body.insertRow();
    for (const cell of cells) row.insertCell().textContent = cell;
  }
  return body;
}

function typeOf(schema = {}) {
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" | ");
  return schema.items ? `${schema.type} of ${typeOf(schema.items)}` : (schema.type ?? schema.$ref?.split("/").pop() ?? "");
}

const answer = await fetch("openapi.json");
const { paths } = await answer.json();
for (const [path, verbs] of Object.entries(paths)) {
  for (const [verb, route] of Object.entries(verbs)) {
    const box = made("details", "", "card route");
    const head = made("summary");
    head.append(made("span", verb.toUpperCase(), "verb"), made("code", path), made("span", route.summary ?? ""));
    box.append(head, made("p", route.description ?? ""));
    const parameters = (route.parameters ?? []).map((one) => [one.name, one.in, typeOf(one.schema), one.description ?? ""]);
    if (parameters.length) box.append(made("h2", "Parameters"), table(parameters));
    for (const kind of Object.keys(route.requestBody?.content ?? {})) box.append(made("p", `Body: ${kind}`));
    box.append(made("h2", "Answers"), table(Object.entries(route.responses).map(([status, one]) => [status, one.description])));
    document.getElementById("routes").append(box);
  }
}

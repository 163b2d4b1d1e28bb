// Builds the API docs from /openapi.json.

const create = (tag, text = "", className = "") =>
  Object.assign(document.createElement(tag), { textContent: text, className });

function table(rows) {
  const body = create("table");
  for (const cells of rows) {
    const row = body.insertRow();
    for (const text of cells) row.insertCell().textContent = text;
  }
  return body;
}

function typeOf(schema = {}) {
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" | ");
  return schema.items ? `${schema.type} of ${typeOf(schema.items)}` : (schema.type ?? schema.$ref?.split("/").pop() ?? "");
}

// A command that works as it stands, for routes without a body or with a file.
function curl(method, path, route) {
  const words = ["curl", "--fail-with-body"];
  if (method !== "get") words.push("-X", method.toUpperCase());
  if (route.requestBody?.content?.["multipart/form-data"]) words.push("-F", "file=@song.mp3");
  else if (route.requestBody) words.push("-H", "'Content-Type: application/json'", "-d", "@body.json");
  const kinds = Object.keys(route.responses["200"]?.content ?? {});
  if (kinds.some((kind) => /zip|audio/.test(kind))) words.push("-OJ");
  return [...words, `'${new URL(path.replace(/^\//, ""), location.href.replace(/docs$/, ""))}'`].join(" ");
}

const response = await fetch("openapi.json");
const { paths, components } = await response.json();

function fieldsOf(schema = {}) {
  const { properties = {}, required = [] } = schema.$ref ? components.schemas[schema.$ref.split("/").pop()] : schema;
  return Object.entries(properties).map(([name, field]) => [
    name, required.includes(name) ? "required" : "", typeOf(field), field.description ?? "",
  ]);
}

for (const [path, methods] of Object.entries(paths)) {
  for (const [method, route] of Object.entries(methods)) {
    const box = create("details", "", "card route");
    const head = create("summary");
    head.append(create("span", method.toUpperCase(), "method"), create("code", path), create("span", route.summary ?? ""));
    box.append(head, create("p", route.description ?? ""), create("pre", decodeURI(curl(method, path, route))));
    const parameters = (route.parameters ?? []).map((parameter) => [
      parameter.name, parameter.in, typeOf(parameter.schema), parameter.description ?? "",
    ]);
    if (parameters.length) box.append(create("h2", "Parameters"), table(parameters));
    for (const [type, { schema }] of Object.entries(route.requestBody?.content ?? {})) {
      box.append(create("h2", `Body: ${type}`));
      const fields = fieldsOf(schema);
      if (fields.length) box.append(table(fields));
    }
    box.append(create("h2", "Responses"), table(Object.entries(route.responses).map(([status, { description }]) => [status, description])));
    document.getElementById("routes").append(box);
  }
}

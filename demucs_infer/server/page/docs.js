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
    box.append(head, create("p", route.description ?? ""));
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

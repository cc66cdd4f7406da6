//! `mesh get`: shows objects.

use std::process::ExitCode;

use futures::{AsyncBufReadExt as _, StreamExt as _, TryStreamExt as _};
use serde_json::{Value, json};

use crate::Global;
use crate::cluster::{AS_TABLE, Cluster, query};
use crate::out::Out;
use crate::resources::{self, Resource, Resources};
use crate::table::{Columns, Table};

/// Show objects
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// TYPE[,TYPE...] [NAME...] or TYPE/NAME...
    #[arg(required_unless_present = "raw", value_name = "TYPE NAME")]
    pub targets: Vec<String>,
    /// Print what the server answers at this path, such as /healthz or /api/v1/nodes
    #[arg(long, value_name = "PATH", conflicts_with_all = ["targets", "output", "selector", "field_selector", "all_namespaces", "watch"])]
    pub raw: Option<String>,
    /// Form of the output
    #[arg(short, long, value_name = "FORM")]
    pub output: Option<Output>,
    /// Only objects with these labels
    #[arg(short = 'l', long, value_name = "LABELS")]
    pub selector: Option<String>,
    /// Only objects with these fields
    #[arg(long, value_name = "FIELDS")]
    pub field_selector: Option<String>,
    /// All namespaces
    #[arg(short = 'A', long)]
    pub all_namespaces: bool,
    /// Go on showing changes
    #[arg(short, long)]
    pub watch: bool,
    /// Labels as the last column
    #[arg(long)]
    pub show_labels: bool,
    /// No headings
    #[arg(long)]
    pub no_headers: bool,
    /// Show who manages which fields, with -o yaml and json
    #[arg(long)]
    pub show_managed_fields: bool,
}

/// Form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// The whole objects as YAML.
    Yaml,
    /// The whole objects as JSON.
    Json,
    /// A table with more columns.
    Wide,
    /// Kinds and names.
    Name,
}

/// Runs the command.
///
/// # Errors
/// An unknown type, an object that is not there, flags that don't fit together.
pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let cluster = global.cluster().await?;
    if let Some(path) = &args.raw {
        if !path.starts_with('/') {
            anyhow::bail!(
                "--raw {path:?}: a path of the API begins with a slash, such as /healthz"
            );
        }
        cluster.print(path, &global.out).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let found = Resources::discover(&cluster).await?;
    let mut queries = Vec::new();
    for (kind, names) in resources::targets(&args.targets)? {
        for resource in found.named(&kind)? {
            if names.is_empty() {
                queries.push(Query {
                    resource: resource.clone(),
                    name: None,
                });
            }
            queries.extend(names.iter().map(|name| Query {
                resource: resource.clone(),
                name: Some(name.clone()),
            }));
        }
    }
    if args.all_namespaces && queries.iter().any(|query| query.name.is_some()) {
        anyhow::bail!(
            "an object can't be retrieved by name across all namespaces; drop -A or give -n NAMESPACE"
        );
    }
    match (args.watch, args.output) {
        (true, _) => watch(&cluster, &queries, &args, &global.out).await?,
        (false, Some(Output::Yaml | Output::Json | Output::Name)) => global
            .out
            .print(&objects(&cluster, &queries, &args).await?)?,
        (false, _) => tables(&cluster, &queries, &args, &global.out).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Objects of one kind, or one of them.
struct Query {
    resource: Resource,
    name: Option<String>,
}

impl Query {
    fn path(&self, cluster: &Cluster, args: &Args) -> String {
        let namespace = (!args.all_namespaces).then_some(cluster.namespace.as_str());
        match &self.name {
            Some(name) => format!("{}/{name}", self.resource.path(namespace)),
            None => format!("{}?{}", self.resource.path(namespace), selectors(args)),
        }
    }
}

fn selectors(args: &Args) -> String {
    let labels = args
        .selector
        .iter()
        .map(|labels| format!("labelSelector={}", query(labels)));
    let fields = args
        .field_selector
        .iter()
        .map(|fields| format!("fieldSelector={}", query(fields)));
    labels.chain(fields).collect::<Vec<_>>().join("&")
}

async fn tables(
    cluster: &Cluster,
    queries: &[Query],
    args: &Args,
    out: &Out,
) -> anyhow::Result<()> {
    let several = queries
        .iter()
        .any(|query| query.resource != queries[0].resource);
    let mut first = true;
    let mut merged: Option<(&Resource, Value)> = None;
    let mut printed = Vec::new();
    for query in queries {
        let table = cluster
            .request(
                "GET",
                &query.path(cluster, args),
                &[("accept", AS_TABLE)],
                Vec::new(),
            )
            .await?;
        match &mut merged {
            Some((resource, all)) if **resource == query.resource => append_rows(all, table),
            other => printed.extend(other.replace((&query.resource, table))),
        }
    }
    printed.extend(merged);
    for (resource, table) in printed {
        let prefix = if several {
            resource.label("")
        } else {
            String::new()
        };
        let columns = Columns {
            wide: args.output == Some(Output::Wide),
            namespace: args.all_namespaces && resource.namespaced,
            labels: args.show_labels,
        };
        let table = Table::from_server(&table, columns, &prefix);
        if table.is_empty() {
            continue;
        }
        if !std::mem::take(&mut first) {
            out.line("")?;
        }
        out.print(&table.render(&table.widths(), !args.no_headers))?;
    }
    if first {
        let namespaced = queries.iter().any(|query| query.resource.namespaced);
        if args.all_namespaces || !namespaced {
            eprintln!("No resources found")
        } else {
            eprintln!("No resources found in {} namespace.", cluster.namespace)
        }
    }
    Ok(())
}

/// Adds the rows of another table of the same kind.
fn append_rows(all: &mut Value, mut table: Value) {
    if let (Some(rows), Some(more)) = (all["rows"].as_array_mut(), table["rows"].as_array_mut()) {
        rows.append(more);
    }
}

/// Whole objects, or their names.
async fn objects(cluster: &Cluster, queries: &[Query], args: &Args) -> anyhow::Result<String> {
    let mut items = Vec::new();
    for query in queries {
        let mut answer = cluster.read(&query.path(cluster, args)).await?;
        let mut found = match answer.get_mut("items").map(Value::take) {
            Some(Value::Array(list)) if query.name.is_none() => list,
            _ => vec![answer],
        };
        for item in &mut found {
            complete(item, &query.resource, args.show_managed_fields);
        }
        items.extend(found.into_iter().map(|item| {
            (
                query
                    .resource
                    .label(item["metadata"]["name"].as_str().unwrap_or_default()),
                item,
            )
        }));
    }
    if args.output == Some(Output::Name) {
        return Ok(items
            .iter()
            .map(|(label, _)| format!("{label}\n"))
            .collect());
    }
    let value = match (queries, items.len()) {
        ([Query { name: Some(_), .. }], 1) => items.remove(0).1,
        _ => {
            json!({ "apiVersion": "v1", "items": items.into_iter().map(|(_, item)| item).collect::<Vec<_>>(), "kind": "List", "metadata": { "resourceVersion": "" } })
        }
    };
    Ok(match args.output {
        Some(Output::Json) => format!("{}\n", serde_json::to_string_pretty(&value)?),
        _ => mesh_api::yaml::to_string(&value),
    })
}

/// Items of a list don't say their kind; nobody reads the managed fields; and fields are sorted by name, as kubectl does.
fn complete(item: &mut Value, resource: &Resource, managed_fields: bool) {
    let api_version = if resource.group.is_empty() {
        resource.version.clone()
    } else {
        format!("{}/{}", resource.group, resource.version)
    };
    if let Some(map) = item.as_object_mut() {
        map.entry("apiVersion")
            .or_insert_with(|| api_version.into());
        map.entry("kind")
            .or_insert_with(|| resource.kind.clone().into());
        if let Some(metadata) = map
            .get_mut("metadata")
            .and_then(Value::as_object_mut)
            .filter(|_| !managed_fields)
        {
            metadata.remove("managedFields");
        }
    }
    item.sort_all_objects();
}

/// Shows what is there, then every change, until it is stopped or the server ends. A table's columns are as wide as the list needs and
/// grow with later rows.
async fn watch(cluster: &Cluster, queries: &[Query], args: &Args, out: &Out) -> anyhow::Result<()> {
    let [query] = queries else {
        anyhow::bail!("-w watches one type, or one object");
    };
    let namespace = (!args.all_namespaces).then_some(cluster.namespace.as_str());
    let mut selector = selectors(args);
    if let Some(name) = &query.name {
        selector = format!(
            "fieldSelector={}",
            crate::cluster::query(&format!("metadata.name={name}"))
        );
    }
    let table = !matches!(
        args.output,
        Some(Output::Yaml | Output::Json | Output::Name)
    );
    let headers: &[(&str, &str)] = if table { &[("accept", AS_TABLE)] } else { &[] };
    let columns = Columns {
        wide: args.output == Some(Output::Wide),
        namespace: args.all_namespaces,
        labels: args.show_labels,
    };
    let mut widths: Option<Vec<usize>> = None;
    if table {
        // The watch follows the list without a gap.
        let path = format!("{}?{selector}", query.resource.path(namespace));
        let list = cluster.request("GET", &path, headers, Vec::new()).await?;
        let revision = list["metadata"]["resourceVersion"].as_str();
        selector.push_str(&format!("&resourceVersion={}", revision.unwrap_or("0")));
        show_rows(&list, columns, !args.no_headers, &mut widths, out)?;
    }
    let lines = cluster
        .stream(
            &format!("{}?watch=true&{selector}", query.resource.path(namespace)),
            headers,
        )
        .await?;
    let mut lines = Box::pin(lines).lines().map_err(anyhow::Error::from);
    while let Some(line) = lines.next().await {
        let event: Value = serde_json::from_str(&line?)?;
        match event["type"].as_str() {
            Some("ERROR") => anyhow::bail!(
                "Error from server ({}): {}",
                event["object"]["reason"].as_str().unwrap_or("Unknown"),
                event["object"]["message"].as_str().unwrap_or_default()
            ),
            Some("BOOKMARK") | None => continue,
            Some(_) => {}
        }
        if table {
            show_rows(
                &event["object"],
                columns,
                !args.no_headers,
                &mut widths,
                out,
            )?;
        } else {
            let mut item = event["object"].clone();
            complete(&mut item, &query.resource, args.show_managed_fields);
            match args.output {
                Some(Output::Name) => out.line(
                    query
                        .resource
                        .label(item["metadata"]["name"].as_str().unwrap_or_default()),
                )?,
                Some(Output::Json) => out.line(serde_json::to_string_pretty(&item)?)?,
                _ => out.print(&format!("---\n{}", mesh_api::yaml::to_string(&item)))?,
            }
        }
    }
    Ok(())
}

/// Prints the rows of a server's table, if it has any, the first ones below the headings.
fn show_rows(
    table: &Value,
    columns: Columns,
    headings: bool,
    widths: &mut Option<Vec<usize>>,
    out: &Out,
) -> anyhow::Result<()> {
    let rows = Table::from_server(table, columns, "");
    if rows.is_empty() {
        return Ok(());
    }
    let first = widths.is_none() && headings;
    let known = widths.get_or_insert_default();
    let needed = rows.widths();
    known.resize(needed.len(), 0);
    for (known, needed) in known.iter_mut().zip(needed) {
        *known = needed.max(*known);
    }
    out.print(&rows.render(known, first))
}

//! A pod's sandbox: its network, UTS and IPC namespaces, held by descriptors (no process is needed for it), and its link to the node.
//!
//! The pod has a /32 address and sends everything, also to other pods, through the node's address on the bridge, so that the service
//! rules in the node's namespace see all of it. The node has a route to each pod, and takes what is for a pod that has gone for its own: it
//! refuses connections at once where they would wait for an answer.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::packet_route::link::{LinkAttribute, State as LinkState};
use rtnetlink::packet_route::route::{RouteMessage, RouteScope, RouteType};
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};

/// The node's address, which is the pods' gateway.
pub const NODE_IP: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 1);
/// The bridge that the pods hang on.
const BRIDGE: &str = "cni0";
/// Its hardware address, made from the node's as container networks do. Without one of its own a bridge takes the lowest of its ports', and
/// what the pods before a new one remember is wrong: everything that they send to the node is lost until they ask again.
const BRIDGE_MAC: [u8; 6] = [0x0a, 0x58, 10, 244, 0, 1];
/// Prefix of the pods' network and of the services'.
const PREFIX: u8 = 16;
const PODS: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 0);
const SERVICES: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 0);
/// How long an address rests before another pod gets it, so that nobody still sends there what was meant for the old one.
const REST: Duration = Duration::from_secs(30);

/// How long a new link may take until it works; it is a millisecond or two on a machine with nothing to do.
const WORKING_LIMIT: Duration = Duration::from_secs(2);

/// The addresses of the pods.
#[derive(Debug, Default)]
pub struct Ipam(Mutex<Leases>);

#[derive(Debug, Default)]
struct Leases {
    used: HashMap<u16, ()>,
    resting: VecDeque<(Instant, u16)>,
    next: u16,
}

impl Ipam {
    /// A free address; `None` when all 65,000 are taken.
    pub fn take(&self, now: Instant) -> Option<Ipv4Addr> {
        let mut leases = self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        while leases
            .resting
            .front()
            .is_some_and(|(since, _)| now.duration_since(*since) >= REST)
        {
            leases.resting.pop_front();
        }
        // 0 and 1 are the network and the node, the last one is broadcast.
        for _ in 2..u16::MAX {
            leases.next = if leases.next < 9 || leases.next >= u16::MAX - 1 {
                10
            } else {
                leases.next + 1
            };
            let number = leases.next;
            if !leases.used.contains_key(&number)
                && !leases.resting.iter().any(|(_, n)| *n == number)
            {
                leases.used.insert(number, ());
                let [high, low] = number.to_be_bytes();
                return Some(Ipv4Addr::new(10, 244, high, low));
            }
        }
        None
    }

    /// Gives an address back.
    pub fn release(&self, ip: Ipv4Addr, now: Instant) {
        let [_, _, high, low] = ip.octets();
        let number = u16::from_be_bytes([high, low]);
        let mut leases = self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if leases.used.remove(&number).is_some() {
            leases.resting.push_back((now, number));
        }
    }
}

/// The namespaces of a pod. Dropping it ends them once the last process in them has ended.
#[derive(Debug)]
pub struct Sandbox {
    /// The pod's address; the node's for pods in the host network.
    pub ip: Ipv4Addr,
    /// `None`: the pod lives in the node's network.
    namespaces: Option<[(File, CloneFlags); 3]>,
}

impl Sandbox {
    /// The sandbox of a pod with `hostNetwork: true`.
    pub fn of_node() -> Self {
        Self {
            ip: NODE_IP,
            namespaces: None,
        }
    }

    /// Makes the namespaces, and the link with the address `ip`. When this returns, packets pass in both directions.
    pub async fn create(ip: Ipv4Addr, hostname: String, index: u64) -> anyhow::Result<Self> {
        let peer = format!("veth{index:x}");
        let namespaces = on_thread(move || make_namespaces(ip, &hostname, &peer)).await?;
        Ok(Self {
            ip,
            namespaces: Some(namespaces),
        })
    }

    /// Enters the namespaces; for a thread of its own that ends afterwards.
    pub fn enter(&self) -> nix::Result<()> {
        for (file, kind) in self.namespaces.iter().flatten() {
            setns(file, *kind)?;
        }
        Ok(())
    }
}

/// Runs `work` on a new thread, whose namespaces it may change.
pub async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let (send, receive) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("namespace".to_owned())
        .spawn(move || drop(send.send(work())))
        .context("starting a thread")?;
    receive
        .await
        .context("the thread in the namespace ended early")?
}

fn connect() -> anyhow::Result<(Handle, impl Future<Output = ()> + Send + 'static)> {
    let (connection, handle, _) =
        rtnetlink::new_connection().context("opening a netlink socket")?;
    Ok((handle, connection))
}

async fn index_of(handle: &Handle, name: &str) -> anyhow::Result<u32> {
    use futures::TryStreamExt;
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    let link = links
        .try_next()
        .await
        .with_context(|| format!("looking for the link {name}"))?;
    Ok(link
        .with_context(|| format!("there is no link {name}"))?
        .header
        .index)
}

async fn attach(handle: &Handle, peer: &str, ip: Ipv4Addr) -> anyhow::Result<()> {
    let (bridge, port) = (
        index_of(handle, BRIDGE).await?,
        index_of(handle, peer).await?,
    );
    handle
        .link()
        .set(
            LinkUnspec::new_with_index(port)
                .controller(bridge)
                .up()
                .build(),
        )
        .execute()
        .await?;
    let route = handle.route().add(pod_route(bridge, ip)).replace();
    route.execute().await.context("adding the route to the pod")
}

fn pod_route(bridge: u32, ip: Ipv4Addr) -> RouteMessage {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(ip, 32)
        .output_interface(bridge)
        .scope(RouteScope::Link)
        .pref_source(NODE_IP)
        .build()
}

/// From now on the node refuses what comes for the pod's address. Without this the packets would go to where the pod was, and whoever sends
/// them would wait until its own time is over.
pub async fn refuse(ip: Ipv4Addr) -> anyhow::Result<()> {
    let (handle, connection) = connect()?;
    let connection = tokio::spawn(connection);
    let refused = async {
        let bridge = index_of(&handle, BRIDGE).await?;
        let gone = handle.route().del(pod_route(bridge, ip)).execute().await;
        gone.with_context(|| format!("removing the route to {ip}"))
    };
    let refused = refused.await;
    connection.abort();
    refused
}

/// Waits until the kernel has put a link to work. It does so in the background after a carrier came, and until then drops what is sent:
/// a first packet that is lost costs its sender a second.
async fn operational(handle: &Handle, name: &str) -> anyhow::Result<()> {
    use futures::TryStreamExt;
    let until = Instant::now() + WORKING_LIMIT;
    loop {
        let mut links = handle.link().get().match_name(name.to_owned()).execute();
        let link = links.try_next().await;
        let link = link.with_context(|| format!("looking at the link {name}"))?;
        let works = |attribute: &LinkAttribute| {
            matches!(attribute, LinkAttribute::OperState(LinkState::Up))
        };
        if link.is_some_and(|link| link.attributes.iter().any(works)) {
            return Ok(());
        }
        if Instant::now() >= until {
            tracing::warn!("the link {name} does not get to work; the pod starts all the same");
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn make_namespaces(
    ip: Ipv4Addr,
    hostname: &str,
    peer: &str,
) -> anyhow::Result<[(File, CloneFlags); 3]> {
    let kinds = [
        CloneFlags::CLONE_NEWNET,
        CloneFlags::CLONE_NEWUTS,
        CloneFlags::CLONE_NEWIPC,
    ];
    let node =
        File::open("/proc/thread-self/ns/net").context("opening the node's network namespace")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting a runtime")?;
    runtime.block_on(async {
        // A netlink socket stays in the namespace that it was opened in.
        let (outside, connection) = connect()?;
        tokio::spawn(connection);
        unshare(kinds[0] | kinds[1] | kinds[2]).context("making the pod's namespaces")?;
        nix::unistd::sethostname(hostname).context("setting the host name")?;
        // Unprivileged processes of a pod may use every port, and ping, as container runtimes have it.
        write_sysctl("net/ipv4/ip_unprivileged_port_start", "0")?;
        let (inside, connection) = connect()?;
        tokio::spawn(connection);
        pod_links(&inside, ip, peer, &node).await?;
        let attached = attach(&outside, peer, ip).await;
        attached.with_context(|| format!("attaching {peer} to {BRIDGE}"))?;
        operational(&inside, "eth0").await?;
        operational(&outside, peer).await?;
        // It has no carrier before its first pod.
        operational(&outside, BRIDGE).await
    })?;
    let open = |name: &str| {
        File::open(format!("/proc/thread-self/ns/{name}")).context("opening the pod's namespaces")
    };
    Ok([
        (open("net")?, kinds[0]),
        (open("uts")?, kinds[1]),
        (open("ipc")?, kinds[2]),
    ])
}

async fn pod_links(handle: &Handle, ip: Ipv4Addr, peer: &str, node: &File) -> anyhow::Result<()> {
    handle
        .link()
        .set(LinkUnspec::new_with_name("lo").up().build())
        .execute()
        .await
        .context("setting lo up")?;
    handle
        .link()
        .add(LinkVeth::new("eth0", peer).build())
        .execute()
        .await
        .context("making the veth pair")?;
    let outer = LinkUnspec::new_with_name(peer)
        .setns_by_fd(node.as_raw_fd())
        .build();
    handle
        .link()
        .set(outer)
        .execute()
        .await
        .context("moving the veth's other end to the node")?;
    let eth0 = index_of(handle, "eth0").await?;
    handle
        .address()
        .add(eth0, ip.into(), 32)
        .execute()
        .await
        .context("giving eth0 its address")?;
    handle
        .link()
        .set(LinkUnspec::new_with_index(eth0).up().build())
        .execute()
        .await
        .context("setting eth0 up")?;
    let gateway = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(NODE_IP, 32)
        .output_interface(eth0)
        .scope(RouteScope::Link);
    handle
        .route()
        .add(gateway.build())
        .execute()
        .await
        .context("adding the route to the node")?;
    let default = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(NODE_IP)
        .output_interface(eth0);
    handle
        .route()
        .add(default.build())
        .execute()
        .await
        .context("adding the default route")
}

/// Sets the node's network up: loopback, the bridge with the node's address, forwarding, and a route by which service addresses pass the
/// rules that rewrite them.
pub async fn prepare_node() -> anyhow::Result<()> {
    let (handle, connection) = connect()?;
    let connection = tokio::spawn(connection);
    let result = node_links(&handle).await;
    connection.abort();
    result.context("setting up the node's network")?;
    let settings = [
        ("net/ipv4/ip_forward", "1"),
        // Pods reach each other through us on purpose; don't tell them of a shorter way.
        ("net/ipv4/conf/all/send_redirects", "0"),
        ("net/ipv4/conf/cni0/send_redirects", "0"),
        ("net/ipv4/ip_unprivileged_port_start", "0"),
    ];
    settings
        .iter()
        .try_for_each(|(name, value)| write_sysctl(name, value))
}

async fn node_links(handle: &Handle) -> anyhow::Result<()> {
    handle
        .link()
        .set(LinkUnspec::new_with_name("lo").up().build())
        .execute()
        .await
        .context("setting lo up")?;
    handle
        .link()
        .add(LinkBridge::new(BRIDGE).address(BRIDGE_MAC.to_vec()).build())
        .execute()
        .await
        .context("making the bridge")?;
    let bridge = index_of(handle, BRIDGE).await?;
    handle
        .address()
        .add(bridge, NODE_IP.into(), 32)
        .execute()
        .await
        .context("giving the bridge its address")?;
    let nobody = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(PODS, PREFIX)
        .output_interface(index_of(handle, "lo").await?)
        .kind(RouteType::Local)
        .scope(RouteScope::Host);
    handle
        .route()
        .add(nobody.build())
        .execute()
        .await
        .context("adding the route for addresses without a pod")?;
    handle
        .address()
        .add(bridge, crate::dns::ADDRESS.into(), 32)
        .execute()
        .await
        .context("giving the bridge the address of the DNS server")?;
    handle
        .link()
        .set(LinkUnspec::new_with_index(bridge).up().build())
        .execute()
        .await
        .context("setting the bridge up")?;
    let services = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(SERVICES, PREFIX)
        .output_interface(bridge)
        .scope(RouteScope::Link);
    handle
        .route()
        .add(services.build())
        .execute()
        .await
        .context("adding the route to the service addresses")
}

fn write_sysctl(name: &str, value: &str) -> anyhow::Result<()> {
    std::fs::write(format!("/proc/sys/{name}"), value).with_context(|| format!("setting {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_rests_before_it_is_used_again() {
        let (ipam, start) = (Ipam::default(), Instant::now());
        let first = ipam.take(start).unwrap();
        assert_ne!(first, NODE_IP);
        ipam.release(first, start);
        let soon: Vec<_> =
            std::iter::from_fn(|| ipam.take(start + Duration::from_secs(29))).collect();
        assert!(!soon.contains(&first));
        assert_eq!(
            ipam.take(start + Duration::from_secs(31)),
            Some(first),
            "the only one left"
        );
    }
}

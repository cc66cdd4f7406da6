//! Namespaces for a test, and links in them.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use futures::TryStreamExt;
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};

const NEEDED: &str = "these tests need a network namespace (as root: CAP_SYS_ADMIN; else unprivileged user namespaces, see the sysctls \
    user.max_user_namespaces, user.max_net_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)";

/// Moves this process, which has one thread, into a network namespace with loopback; where that needs it, as root of a user namespace.
pub fn enter() {
    match unshare(CloneFlags::CLONE_NEWNET) {
        Ok(()) => {}
        Err(Errno::EPERM) => enter_user(),
        Err(error) => panic!("making a network namespace: {error}; {NEEDED}"),
    }
    on_links(async |links| links.up("lo").await);
}

fn enter_user() {
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET)
        .unwrap_or_else(|e| panic!("making a user and a network namespace: {e}; {NEEDED}"));
    for (file, text) in [
        ("uid_map", format!("0 {uid} 1")),
        // Without it an ordinary user may not write the next (user_namespaces(7)).
        ("setgroups", "deny".to_owned()),
        ("gid_map", format!("0 {gid} 1")),
    ] {
        std::fs::write(format!("/proc/self/{file}"), text)
            .unwrap_or_else(|e| panic!("writing /proc/self/{file}: {e}; {NEEDED}"));
    }
}

/// The links of the calling thread's network namespace.
pub struct Links(Handle);

/// Runs `work` on the links of the calling thread's network namespace.
pub fn on_links(work: impl AsyncFnOnce(&Links) -> Result<(), rtnetlink::Error>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        tokio::spawn(connection);
        let done = work(&Links(handle)).await;
        done.unwrap_or_else(|e| panic!("setting up the links of the namespace: {e}; {NEEDED}"));
    });
}

impl Links {
    pub async fn up(&self, name: &str) -> Result<(), rtnetlink::Error> {
        let up = LinkUnspec::new_with_name(name).up().build();
        self.0.link().set(up).execute().await
    }

    pub async fn address(
        &self,
        link: &str,
        ip: impl Into<IpAddr>,
        prefix: u8,
    ) -> Result<(), rtnetlink::Error> {
        let index = self.index(link).await?;
        let add = self.0.address().add(index, ip.into(), prefix);
        add.execute().await
    }

    pub async fn default_route6(&self, gateway: Ipv6Addr) -> Result<(), rtnetlink::Error> {
        let route = RouteMessageBuilder::<Ipv6Addr>::new().gateway(gateway);
        self.0.route().add(route.build()).execute().await
    }

    pub async fn default_route(&self, gateway: Ipv4Addr) -> Result<(), rtnetlink::Error> {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway);
        self.0.route().add(route.build()).execute().await
    }

    /// A pair of links: `here`, and `there` in another network namespace.
    pub async fn veth(
        &self,
        here: &str,
        there: &str,
        namespace: &File,
    ) -> Result<(), rtnetlink::Error> {
        let pair = LinkVeth::new(here, there).build();
        self.0.link().add(pair).execute().await?;
        let moved = LinkUnspec::new_with_name(there)
            .setns_by_fd(namespace.as_raw_fd())
            .build();
        self.0.link().set(moved).execute().await
    }

    async fn index(&self, name: &str) -> Result<u32, rtnetlink::Error> {
        let mut found = self.0.link().get().match_name(name.to_owned()).execute();
        Ok(found.try_next().await?.unwrap().header.index)
    }
}

//! Whose address a request came from when proxies stand in front: `X-Forwarded-For`, as far as it was written by proxies that we
//! trust. What anybody else wrote into it is a claim, and counts for nothing.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderName};
use ipnet::IpNet;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The right-most address that is not one of our proxies. Each proxy appends whom it heard, so everything to the left of that
/// address was written by the client.
pub(super) fn client_address(peer: SocketAddr, headers: &HeaderMap, trusted: &[IpNet]) -> IpAddr {
    let is_trusted = |address: IpAddr| trusted.iter().any(|network| network.contains(&address));
    let mut nearest = peer.ip().to_canonical();
    if !is_trusted(nearest) {
        return nearest;
    }
    // Several lines are one list (RFC 9110 section 5.3).
    let lines = headers.get_all(X_FORWARDED_FOR).iter().rev();
    for hop in lines.flat_map(|line| line.to_str().unwrap_or("unreadable").rsplit(',')) {
        let Some(address) = address_of(hop.trim()) else { return nearest };
        nearest = address;
        if !is_trusted(nearest) {
            return nearest;
        }
    }
    nearest
}

/// Some proxies add the port.
fn address_of(hop: &str) -> Option<IpAddr> {
    let address = hop.parse().or_else(|_| hop.parse::<SocketAddr>().map(|address| address.ip()));
    let address = address.ok().or_else(|| hop.strip_prefix('[')?.strip_suffix(']')?.parse().ok());
    address.map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn networks(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|network| network.parse().unwrap()).collect()
    }

    fn client(peer: &str, lines: &[&str], trusted: &[&str]) -> String {
        let lines = lines.iter().map(|line| (X_FORWARDED_FOR, HeaderValue::from_str(line).unwrap()));
        let mut headers = HeaderMap::new();
        headers.extend(lines);
        client_address(SocketAddr::new(peer.parse().unwrap(), 1), &headers, &networks(trusted)).to_string()
    }

    #[test]
    fn the_client_is_the_right_most_address_that_is_no_proxy_of_ours() {
        let proxies = &["10.0.0.0/8", "fd00::/8", "192.0.2.9/32"];
        for (peer, lines, expected) in [
            ("10.0.0.1", &["203.0.113.7"][..], "203.0.113.7"),
            ("10.0.0.1", &["203.0.113.7, 10.2.3.4"], "203.0.113.7"),
            ("10.0.0.1", &["198.51.100.1, 203.0.113.7"], "203.0.113.7"), // the first is what the client claims
            ("10.0.0.1", &["198.51.100.1", "203.0.113.7, 192.0.2.9"], "203.0.113.7"),
            ("10.0.0.1", &["203.0.113.7:4711"], "203.0.113.7"),
            ("10.0.0.1", &["[2001:db8::7]:4711"], "2001:db8::7"),
            ("10.0.0.1", &["[2001:db8::7]"], "2001:db8::7"),
            ("10.0.0.1", &["2001:db8::7"], "2001:db8::7"),
            ("fd00::1", &["2001:db8::7"], "2001:db8::7"),
            ("::ffff:10.0.0.1", &["::ffff:203.0.113.7"], "203.0.113.7"),
            ("10.0.0.1", &[], "10.0.0.1"),
            ("10.0.0.1", &["10.1.1.1, 10.2.2.2"], "10.1.1.1"),
            ("10.0.0.1", &["unknown"], "10.0.0.1"),
            ("10.0.0.1", &["203.0.113.7, "], "10.0.0.1"),
            ("10.0.0.1", &["203.0.113.7, nonsense, 10.2.3.4"], "10.2.3.4"),
            ("203.0.113.1", &["198.51.100.1"], "203.0.113.1"), // not through a proxy of ours
        ] {
            assert_eq!(client(peer, lines, proxies), expected, "{peer} {lines:?}");
        }
        assert_eq!(client("10.0.0.1", &["203.0.113.7"], &[]), "10.0.0.1", "nobody is trusted by default");
    }

    proptest! {
        #[test]
        fn what_a_client_writes_never_chooses_its_address(claim in "[ -~]{0,60}", second in "[0-9.,: ]{0,30}") {
            let lines = [&*claim, &*second, "203.0.113.7, 10.0.0.2"];
            prop_assert_eq!(client("10.0.0.1", &lines, &["10.0.0.0/8"]), "203.0.113.7");
            prop_assert_eq!(client("198.51.100.1", &lines, &["10.0.0.0/8"]), "198.51.100.1");
        }
    }
}

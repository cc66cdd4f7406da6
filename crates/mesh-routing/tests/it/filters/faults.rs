//! Faults: their shares, and asking for them by headers.

use super::*;

#[test]
fn faults_are_drawn_by_their_percentages() {
    let delay = |numerator, denominator| fault_common::FaultDelay {
        percentage: Some(FractionalPercent {
            numerator,
            denominator: denominator as i32,
        }),
        fault_delay_secifier: Some(fault_common::fault_delay::FaultDelaySecifier::FixedDelay(
            Duration {
                seconds: 7,
                nanos: 0,
            },
        )),
    };
    let none = HeaderMap::new();
    for (numerator, denominator, of) in [
        (25, DenominatorType::Hundred, 100),
        (25, DenominatorType::TenThousand, 10_000),
        (25, DenominatorType::Million, 1_000_000),
    ] {
        let manager = manager(vec![filter(
            "fault",
            &fault::HttpFault {
                delay: Some(delay(numerator, denominator)),
                ..Default::default()
            },
        )])
        .expect("a manager");
        let Some(Active::Fault(fault)) = manager.filters.active(None).next() else {
            panic!("no fault");
        };
        let delayed = (0..of).filter(|r| fault.delay(&none, *r).is_some()).count();
        assert_eq!(delayed, 25, "of {of}");
        assert_eq!(
            fault.delay(&none, 0),
            Some(std::time::Duration::from_secs(7))
        );
        assert!(fault.abort(&none, 0).is_none());
    }
}

#[test]
fn faults_can_be_asked_for_by_headers() {
    let manager = manager(vec![filter(
        "fault",
        &fault::HttpFault {
            delay: Some(fault_common::FaultDelay {
                percentage: percent(100),
                fault_delay_secifier: Some(
                    fault_common::fault_delay::FaultDelaySecifier::HeaderDelay(Default::default()),
                ),
            }),
            abort: Some(fault::FaultAbort {
                percentage: percent(50),
                error_type: Some(fault::fault_abort::ErrorType::HeaderAbort(
                    Default::default(),
                )),
                response_body: "broken on purpose".to_owned(),
            }),
            headers: vec![route::HeaderMatcher {
                name: "x-test".to_owned(),
                ..Default::default()
            }],
            ..Default::default()
        },
    )])
    .expect("a manager");
    let Some(Active::Fault(fault)) = manager.filters.active(None).next() else {
        panic!("no fault");
    };
    let asked = headers(&[
        ("x-test", "1"),
        ("x-envoy-fault-delay-request", "1500"),
        ("x-envoy-fault-abort-grpc-request", "5"),
        ("x-envoy-fault-abort-request-percentage", "10"),
    ]);
    assert!(fault.applies(&view("GET", "/", &asked), Some("c")));
    assert!(!fault.applies(&view("GET", "/", &HeaderMap::new()), Some("c")));
    assert_eq!(
        fault.delay(&asked, 99),
        Some(std::time::Duration::from_millis(1500))
    );
    assert_eq!(
        fault.delay(&HeaderMap::new(), 0),
        None,
        "nothing was asked for"
    );
    let abort = fault.abort(&asked, 9).expect("an abort");
    assert_eq!((abort.status, abort.grpc), (StatusCode::OK, Some(5)));
    assert_eq!(abort.body, "broken on purpose");
    assert!(
        fault.abort(&asked, 10).is_none(),
        "the header lowers the percentage"
    );
    let more = headers(&[
        ("x-envoy-fault-abort-request", "418"),
        ("x-envoy-fault-abort-request-percentage", "100"),
    ]);
    assert!(fault.abort(&more, 50).is_none(), "but never raises it");
    let abort = fault.abort(&more, 49).expect("an abort");
    assert_eq!((abort.status, abort.grpc), (StatusCode::IM_A_TEAPOT, None));
}

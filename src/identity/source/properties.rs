//! Pauses of the token source, whatever Entra asks for.

use http::StatusCode;
use proptest::option;
use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn a_cool_down_is_never_a_storm_and_never_longer_than_five_minutes(
        status in 100u16..=999, failures in prop_oneof![0u32..12, any::<u32>()], pause in option::of(any::<Duration>())
    ) {
        let status = StatusCode::from_u16(status).ok();
        let error = IdentityError { status, pause, ..IdentityError::new(FaultClass::Http, "client secret") };
        let wait = cool_down(&error, failures);
        prop_assert!(wait >= FIRST_COOL_DOWN.mul_f64(0.8) && wait <= LONGEST_PAUSE, "{:?}", wait);
        prop_assert!(wait >= pause.unwrap_or_default().min(LONGEST_PAUSE));
        prop_assert!(pause.is_some_and(|pause| pause > LAST_COOL_DOWN) || wait <= LAST_COOL_DOWN);
    }

    #[test]
    fn a_token_is_refreshed_before_it_is_unusable_and_unusable_before_it_expires(secret in ".{1,60}", life in 1u64..=172_800) {
        let (now, life) = (Instant::now(), Duration::from_secs(life));
        let Some(token) = BearerToken::new(&secret, now, life) else {
            prop_assert!(secret.contains(|c: char| c.is_control()));
            return Ok(());
        };
        prop_assert!(now < token.refresh_at && token.refresh_at < token.unusable_at && token.unusable_at < token.expires_at);
        prop_assert!(token.is_usable(now) && !token.is_usable(token.expires_at));
        let shown = format!("{token:?}");
        prop_assert_eq!(shown, "BearerToken { .. }");
    }
}

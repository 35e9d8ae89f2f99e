from hypothesis import HealthCheck, settings

# A slow machine is no failure, and files of one test may be shared by its examples.
settings.register_profile(
    "griffin", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("griffin")
